"""Reformer: attention to keys in the same hash bucket (LSH attention, Kitaev et al. 2020)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genai_pl.errors import ConfigError
from genai_pl.kernels.attention import attention_with
from genai_pl.kernels.efficient.common import blocks_with_neighbours, pad_to_blocks, refuse, split_into_blocks
from genai_pl.kernels.mask import AttentionMask
from genai_pl.kernels.score_options import PLAIN, ScoreOptions
from genai_pl.kernels.uncompiled import uncompiled

ONLY_CHOICE = -3e4  # added to a position's score of itself: far below every other, and finite in float16


class Reformer(nn.Module):
    """Attention whose keys are the normalized queries, within buckets of similar directions.

    n_hashes: rounds of hashing, R; a key that several rounds find counts once for each. bucket_size: positions per bucket
    on average, and how far apart in the sorted row a query and key may be. seed: of the random directions.

    Positions are sorted by (document, bucket, position), and each sees those of its bucket that are fewer than
    `bucket_size` steps away, itself only if there is nothing else. Kitaev et al. split the sorted row into chunks, whose
    bounds move with later tokens; here neither the future nor another document changes who is seen, so that the model is
    causal. Fewer queries than keys (decoding) are exact, unhashed attention.
    """

    def __init__(self, *, n_hashes: int, bucket_size: int, seed: int) -> None:
        super().__init__()
        self.n_hashes, self.bucket_size, self.seed = n_hashes, bucket_size, seed

    def forward(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor,
        mask: AttentionMask,
        options: ScoreOptions = PLAIN,
    ) -> Tensor:
        """(B, H, T, D); k is not read where T = S, and holds all queries, from the cache, where T < S."""
        refuse("reformer", mask, options, supported=("dropout",))
        if mask.query_segments is not None:
            raise ConfigError(
                "model.attention_kind=reformer attends to the queries themselves, never to another row: "
                "set model.attention_kind=full"
            )
        H, T, D = q.shape[1:]
        S = v.shape[2]
        scale = D**-0.5 if options.scale is None else options.scale
        v = v.repeat_interleave(H // v.shape[1], dim=1)  # (B, H, S, D)
        if T == S:
            return self._hashed(q, v, mask, scale=scale, dropout_p=options.dropout_p)
        keys = F.normalize(k.repeat_interleave(H // k.shape[1], dim=1), dim=-1)
        # exact attention: a position sees itself only as a last resort
        itself = torch.arange(S, device=q.device) == torch.arange(S - T, S, device=q.device)[:, None]  # (T, S)
        reluctance = torch.where(itself, ONLY_CHOICE, 0.0).to(q.dtype)
        return attention_with(q, keys, v, mask, options._replace(scale=scale, bias=reluctance))

    def _hashed(self, q: Tensor, v: Tensor, mask: AttentionMask, *, scale: float, dropout_p: float) -> Tensor:
        """Attention of all rounds, each weighted by the sum of its exponentials (eq. 6 and appendix A).

        Sort positions into groups, attend to neighbours in the sorted row, and put the results back.
        """
        S = q.shape[2]
        block = min(self.bucket_size, S)
        groups = self._groups(q.detach(), mask)  # (B, H, R, S)
        order = groups.argsort(dim=-1, stable=True)
        rank = order.argsort(dim=-1)
        sorted_groups = pad_to_blocks(groups.gather(-1, order)[..., None], block)
        queries, values = (pad_to_blocks(_gather_rounds(x, order), block) for x in (q, v))  # (B, H, R, N * block, D)
        y, log = _attend_to_neighbours(
            queries, values, sorted_groups, block, causal=mask.causal, scale=scale, dropout_p=dropout_p
        )
        log = log.gather(-1, rank)  # (B, H, R, S)
        y = y.gather(-2, rank[..., None].expand(*rank.shape, y.shape[-1]))
        return (log.softmax(2)[..., None] * y).sum(2).to(q.dtype)

    def _groups(self, q: Tensor, mask: AttentionMask) -> Tensor:
        """The group of each position in each round, (B, H, R, S): a number per document and bucket, 0 for padding."""
        S = q.shape[2]
        n_half = -(-S // (2 * self.bucket_size)) if self.bucket_size < S else 0
        if n_half:
            groups = lsh_buckets(q, n_hashes=self.n_hashes, n_half=n_half, seed=self.seed)
        else:
            groups = torch.zeros_like(q[..., 0], dtype=torch.long)[:, :, None]  # one bucket, and one round of it
        if mask.segments is None:
            return groups + 1
        documents = mask.segments[:, None, None]  # (B, 1, 1, S)
        return torch.where(documents == 0, 0, documents * max(2 * n_half, 1) + groups)


def lsh_buckets(q: Tensor, *, n_hashes: int, n_half: int, seed: int) -> Tensor:
    """The bucket of each query, (B, H, R, S): the nearest of n_half random directions and their opposites (section 2).

    Near directions fall into the same bucket with high probability; R rounds make it unlikely that all miss.
    """
    directions = _directions(q.shape[-1], n_hashes * n_half, seed).to(q)
    products = (q @ directions).unflatten(-1, (n_hashes, n_half))  # (B, H, S, R, n_half)
    return torch.cat([products, -products], dim=-1).argmax(-1).transpose(-2, -1)


@uncompiled("dynamo cannot trace a generator")
def _directions(head_dim: int, n: int, seed: int) -> Tensor:
    """Random directions, (head_dim, n), the same in every call, so that a token keeps its bucket."""
    return torch.randn(head_dim, n, generator=torch.Generator().manual_seed(seed), device="cpu")


def _gather_rounds(x: Tensor, order: Tensor) -> Tensor:
    """x (B, H, S, D) in the order (B, H, R, S) of each round, (B, H, R, S, D)."""
    x = x[:, :, None].expand(-1, -1, order.shape[2], -1, -1)
    return x.gather(-2, order[..., None].expand(x.shape))


def _attend_to_neighbours(
    q: Tensor, v: Tensor, groups: Tensor, block: int, *, causal: bool, scale: float, dropout_p: float
) -> tuple[Tensor, Tensor]:
    """Attention within groups (..., L, 1) to keys fewer than `block` steps away in the sorted row.

    q, v: (..., L, D), L a multiple of block. Returns outputs (..., L, D) and log-sum-exps (..., L). Each block of queries
    meets the block and its neighbours, so memory is L * 3 block at most.
    """
    reach = {"before": block - 1, "after": 0 if causal else block - 1}
    keys = blocks_with_neighbours(F.normalize(q, dim=-1), block, **reach)  # (..., N, width, D)
    values = blocks_with_neighbours(v, block, **reach)
    key_groups = blocks_with_neighbours(groups, block, **reach).transpose(-2, -1)  # (..., N, 1, width)
    steps = torch.arange(keys.shape[-2], device=q.device) - torch.arange(block, device=q.device)[:, None] - (block - 1)
    near = (steps <= 0) & (steps > -block) if causal else steps.abs() < block  # (block, width)
    visible = (split_into_blocks(groups, block) == key_groups) & (key_groups != 0) & near  # (..., N, block, width)
    # softmax over the neighbourhood, in float32
    blind = ~visible.any(-1, keepdim=True)
    scores = (split_into_blocks(q, block) * scale) @ keys.transpose(-2, -1)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    scores = scores + torch.where(steps == 0, ONLY_CHOICE, 0.0).masked_fill(~(visible | blind), float("-inf"))
    log = scores.logsumexp(-1, keepdim=True)  # (..., N, block, 1)
    weights = F.dropout((scores - log).exp(), dropout_p)
    y = (weights.to(values.dtype) @ values).masked_fill(blind, 0.0)
    return y.to(log.dtype).flatten(-3, -2), log[..., 0].flatten(-2)
