"""Window attention with a few global positions, in time linear in S (Longformer, Beltagy et al. 2020)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genai_pl.kernels.attention import attention_with, choose_backend
from genai_pl.kernels.efficient.common import blocks_with_neighbours, pad_to_blocks, refuse, split_into_blocks
from genai_pl.kernels.mask import AttentionMask
from genai_pl.kernels.score_options import PLAIN, ScoreOptions

MIN_BLOCK = 64  # shorter blocks are matrices too small to multiply well


class WindowAttention(nn.Module):
    """Keys fewer than `window` positions away, and the first `n_global` positions, which see all and are seen by all.

    window: in positions, to both sides, or to the past under a causal mask. n_global: positions. backend: a name of
    `kernels.BACKENDS`. Three computations, each exact: global queries over everything, other queries in one call where the
    backend skips hidden keys (Triton) or there are few, else in blocks.

    Documents of a packed row stay apart, and the global positions are the first of the row, not of each document: only its
    first documents have any. Queries and keys are projected once, where Longformer has projections of their own for global
    positions.
    """

    def __init__(self, *, window: int, n_global: int, backend: str) -> None:
        super().__init__()
        self.window, self.n_global, self.backend = window, n_global, backend
        self.block = max(window, MIN_BLOCK)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: AttentionMask,
        options: ScoreOptions = PLAIN,
    ) -> Tensor:
        """(B, H, T, D); `options` without bias and ALiBi, which have an entry for each query and key."""
        refuse("window", mask, options, supported=("softcap", "dropout"), window=self.window)
        (T, D), S = q.shape[2:], k.shape[2]
        n_early = min(max(self.n_global - (S - T), 0), T)  # queries that are global
        parts = []
        if n_early:
            parts.append(self._global(q[:, :, :n_early], k, v, mask, T, options))
        if n_early < T:
            backend, _ = choose_backend(q.device, options=options, head_dim=D, dtype=q.dtype, backend=self.backend)
            # Triton skips keys outside a window; the other backends compute all of them, unless they come in blocks
            in_blocks = backend != "triton" and T == S and 2 * self.block < S
            local = self._blocks if in_blocks else self._rows
            parts.append(local(q[:, :, n_early:], k, v, mask, options))
        return torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]

    def _global(self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, T: int, options: ScoreOptions) -> Tensor:
        """Attention of the first queries, which are global, to everything, (B, H, n_early, D); T: of all queries."""
        n_early, S = q.shape[2], k.shape[2]
        if mask.causal:  # the mask aligns the last key with the last query
            end = S - T + n_early
            k, v = k[:, :, :end], v[:, :, :end]

        def build() -> AttentionMask:
            if mask.segments is None:
                return AttentionMask(causal=mask.causal)
            queries = mask.segments_of_queries(T, S)[:, :n_early]
            keys = mask.segments[:, : k.shape[2]]
            return AttentionMask(causal=mask.causal, segments=keys, query_segments=queries)

        global_mask = mask.remember("window global", (T, S, self.n_global), build)
        return attention_with(q, k, v, global_mask, options, backend=self.backend)

    def _rows(self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, options: ScoreOptions) -> Tensor:
        """Attention of the last queries to their windows and the global keys, in one call, (B, H, n, D)."""
        n = q.shape[2]

        def build() -> AttentionMask:
            queries = None if mask.query_segments is None else mask.query_segments[:, -n:]
            return AttentionMask(
                causal=mask.causal,
                window=self.window,
                prefix=self.n_global or None,
                segments=mask.segments,
                query_segments=queries,
            )

        row_mask = mask.remember("window rows", (n, self.window, self.n_global), build)
        return attention_with(q, k, v, row_mask, options, backend=self.backend)

    def _blocks(self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, options: ScoreOptions) -> Tensor:
        """`_rows` for T = S in memory linear in S: each block of queries is a row of a batch, with the keys that it may see.

        A block of `self.block` queries meets the global keys, its own and those within reach on both sides.
        """
        B, S = q.shape[0], k.shape[2]
        n_early = S - q.shape[2]
        before, after = self._reach(mask)
        q = F.pad(q, (0, 0, n_early, 0))  # so that a block of queries and of keys begin together
        q = (
            split_into_blocks(pad_to_blocks(q, self.block), self.block).transpose(1, 2).flatten(0, 1)
        )  # (B * N, H, block, D)
        k, v = (self._with_globals(x, before, after) for x in (k, v))  # (B * N, K, n_global + width, D)
        key = (B, S, self.window, self.n_global, q.device)
        blocks = mask.remember("window blocks", key, lambda: self._block_mask(mask, B, S, q.device))
        y = attention_with(q, k, v, blocks, options, backend=self.backend)
        y = y.unflatten(0, (B, -1)).transpose(1, 2).flatten(2, 3)  # (B, H, N * block, D)
        return y[:, :, n_early:S]

    def _reach(self, mask: AttentionMask) -> tuple[int, int]:
        """How many positions before and after its own a query sees, apart from global ones."""
        return self.window - 1, 0 if mask.causal else self.window - 1

    def _with_globals(self, x: Tensor, before: int, after: int) -> Tensor:
        """Global positions and neighbourhood of each of N blocks, (B, K, S, D) -> (B * N, K, n_global + width, D)."""
        near = blocks_with_neighbours(pad_to_blocks(x, self.block), self.block, before=before, after=after)
        first = x[:, :, None, : self.n_global].expand(-1, -1, near.shape[2], -1, -1)  # (B, K, N, n_global, D)
        return torch.cat([first, near], dim=3).transpose(1, 2).flatten(0, 1)

    def _block_mask(self, mask: AttentionMask, B: int, S: int, device: torch.device) -> AttentionMask:
        """The mask of the rows of `_with_globals`; positions beyond the ends of the row are padding."""
        before, after = self._reach(mask)
        ones = torch.ones(1, S, dtype=torch.long, device=device)
        keys = ones if mask.segments is None else mask.segments
        queries = ones if mask.segments is None else mask.segments_of_queries(S, S)
        near = keys.clone()
        near[:, : self.n_global] = 0  # they are in the prefix, and must not count twice
        near = blocks_with_neighbours(
            pad_to_blocks(near[..., None], self.block), self.block, before=before, after=after
        )
        first = keys[:, None, : self.n_global].expand(-1, near.shape[1], -1)  # (B, N, n_global)
        keys = torch.cat([first, near[..., 0]], dim=2).expand(B, -1, -1).flatten(0, 1)  # (B * N, n_global + width)
        queries = split_into_blocks(pad_to_blocks(queries[..., None], self.block), self.block)[..., 0]
        queries = queries.expand(B, -1, -1).flatten(0, 1)  # (B * N, block)
        # the rows end `after` positions past their queries, so the window to both sides is a causal one of its width
        window = before + 1 + after
        return AttentionMask(
            causal=True, window=window, prefix=self.n_global or None, segments=keys, query_segments=queries
        )
