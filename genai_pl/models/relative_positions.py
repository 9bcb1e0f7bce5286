"""Relative positions in the scores: T5's learned bias per bucket of distance, and Transformer-XL's products with distances.

Both add a term to the scores that depends on how far a key is from a query, and leave queries and keys of the first kind
as they are. T5's bias is shared by all layers of a stack; XL's is computed by each layer from its own queries.
"""

import math

import torch
from torch import Tensor, nn

from genai_pl.config.model import ModelConfig


class RelativeBias(nn.Module):
    """A learned number per head and bucket of distance, added to unscaled scores (Raffel et al. 2020, section 2.1).

    config: `relative_buckets`, `relative_max_distance`, `n_head`. causal: whether keys to the right get buckets.
    """

    def __init__(self, config: ModelConfig, *, causal: bool) -> None:
        super().__init__()
        self.causal, self.max_distance = causal, config.relative_max_distance
        self.n_buckets = config.relative_buckets
        self.table = nn.Embedding(config.relative_buckets, config.n_head)

    def forward(self, T: int, S: int) -> Tensor:
        """The bias (1, H, T, S) of the last T of S consecutive positions."""
        device = self.table.weight.device
        distance = torch.arange(S, device=device) - torch.arange(S - T, S, device=device)[:, None]  # (T, S)
        bucket = relative_bucket(distance, causal=self.causal, n_buckets=self.n_buckets, max_distance=self.max_distance)
        return self.table(bucket).permute(2, 0, 1)[None]


def relative_bucket(distance: Tensor, *, causal: bool, n_buckets: int, max_distance: int) -> Tensor:
    """The bucket of key position minus query position, same shape: exact when near, by logarithm up to max_distance.

    Without `causal`, half of the buckets are for keys to the right; with it, those count as distance 0. Half of a side's
    buckets hold one distance each, the others grow geometrically; everything beyond max_distance is in the last.

    >>> relative_bucket(-torch.tensor([0, 3, 15, 16, 40, 500]), causal=True, n_buckets=32, max_distance=128).tolist()
    [0, 3, 15, 16, 23, 31]
    """
    first = torch.zeros_like(distance)
    if causal:
        distance = (-distance).clamp(min=0)
    else:
        n_buckets //= 2
        first = (distance > 0).long() * n_buckets
        distance = distance.abs()
    exact = n_buckets // 2
    log = torch.log(distance.float() / exact) / math.log(max_distance / exact)  # -inf at 0 is not used
    far = (exact + (log * (n_buckets - exact)).clamp(min=0).long()).clamp(max=n_buckets - 1)
    return first + torch.where(distance < exact, distance, far)


class XLPositions(nn.Module):
    """Scores of queries against distances and segments, one module per layer (Dai et al. 2019, section 3.3; Yang et al. 2019).

    A score is (q + content_bias) k + (q + position_bias) r(distance) + (q + type_bias) e(same or other segment). The first
    term stays a product with keys, which attention computes; this module gives its queries and the sum of the others.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        H, D = config.n_head, config.head_dim
        self.r_proj = nn.Linear(config.n_embd, H * D, bias=False)
        self.content_bias = nn.Parameter(torch.empty(H, D))
        self.position_bias = nn.Parameter(torch.empty(H, D))
        self.type_bias = nn.Parameter(torch.empty(H, D))
        self.type_embed = nn.Parameter(torch.empty(2, H, D))  # keys in the query's segment; in another

    def forward(
        self, q: Tensor, token_positions: Tensor, S: int, *, scale: float, segment_differs: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The queries (B, H, T, D) to multiply keys with, and the bias of the scaled scores, (B, H, T, S).

        token_positions (B or 1, T): the columns of the queries among the S keys. segment_differs (B, T, S): True where a key
        is of another segment than the query, None without segments. scale: that of the scores.
        """
        # products with every distance -S+1 .. S-1, from which each query gathers the S that it needs
        encoding = self._encode(torch.arange(-S + 1, S, device=q.device))  # (2S-1, C), of query minus key
        r = self.r_proj(encoding.to(self.r_proj.weight.dtype)).view(2 * S - 1, q.shape[1], -1)  # (2S-1, H, D)
        by_distance = torch.einsum("bhtd,lhd->bhtl", q + self.position_bias[:, None].to(q.dtype), r.to(q.dtype))
        index = token_positions[:, :, None] - torch.arange(S, device=q.device) + S - 1  # (B or 1, T, S)
        bias = by_distance.gather(3, index[:, None].expand(q.shape[0], q.shape[1], -1, -1))
        # two products per query decide between its own segment and others
        if segment_differs is not None:
            by_type = torch.einsum("bhtd,shd->bhts", q + self.type_bias[:, None], self.type_embed)  # (B, H, T, 2)
            bias = bias + torch.where(segment_differs[:, None], by_type[..., 1:], by_type[..., :1])
        return q + self.content_bias[:, None].to(q.dtype), bias * scale

    def _encode(self, distance: Tensor) -> Tensor:
        """Sines, then cosines, of distances (N,), (N, C): not interleaved, unlike `sinusoidal`."""
        C = self.r_proj.in_features
        frequency = 10000 ** -(torch.arange(0, C, 2, device=distance.device).float() / C)
        angle = distance[:, None].float() * frequency
        return torch.cat([angle.sin(), angle.cos()], dim=-1)
