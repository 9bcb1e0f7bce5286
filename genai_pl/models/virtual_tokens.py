"""Virtual tokens: learned tokens before every text, which prompt tuning and prefix tuning train instead of weights.

In a decoder they stand once at the beginning of a row, in positions 0 .. P-1, and all documents see them: `VirtualPrefix`
carries them through one call, and the mask's `global_prefix` shows them across documents. In an encoder, tokens see both
ways, so virtual tokens that all documents share would let one document look at another: there they are inserted before
each document (`interleave`).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genai_pl.kernels import positions_from_segments
from genai_pl.models.positions import alibi_slopes
from genai_pl.models.relative_positions import RelativeBias, relative_bucket


class VirtualTokens(nn.Module):
    """n_tokens learned tokens at positions 0 .. n_tokens - 1 of every document; the text's positions follow them.

    They are embeddings that pass through all layers (prompt tuning, Lester et al. 2021), or keys and values of each
    layer's attention (prefix tuning, Li and Liang 2021): a subclass overrides `embeddings` or `layers`.
    """

    n_tokens: int

    def is_off(self) -> bool:
        """True while the model shall run without them, as a reference model does."""
        raise NotImplementedError

    def rows(self) -> Tensor | None:
        """True for rows of the batch that have them, (B,); None: all. Requests with and without an adapter share a batch."""
        raise NotImplementedError

    def embeddings(self) -> Tensor | None:
        """Token embeddings (P, embedding_size), or None."""
        return None

    def layers(self) -> Tensor | None:
        """Keys and values of all layers, (L, 2, K, P, D), or None."""
        return None


class VirtualPrefix(NamedTuple):
    """The virtual tokens of one forward call.

    n           how many columns they take before each row's text, in every row
    rows        (B,) True for rows that see them; None: all
    embeddings  (P, embedding_size), if they pass through the blocks in this call
    layers      (L, 2, K, P, D), keys and values, if they enter the cache in this call
    """

    n: int = 0
    rows: Tensor | None = None
    embeddings: Tensor | None = None
    layers: Tensor | None = None

    @property
    def global_prefix(self) -> int | Tensor | None:
        """The `global_prefix` of the mask: how many first keys each row sees whatever document a query is of."""
        if self.rows is None:
            return self.n or None
        return self.n * self.rows.long()

    @property
    def n_queries(self) -> int:
        """The number of virtual tokens that are queries in this call: all that enter as embeddings."""
        return 0 if self.embeddings is None else self.n

    def prepend_positions(
        self, segments: Tensor | None, positions: Tensor, *, explicit: bool
    ) -> tuple[Tensor | None, Tensor]:
        """Segments (B, S) and positions (S,) or (B, S) of a text, with the virtual tokens before it, (..., n + S).

        Virtual tokens get segment 0: no document, seen through `global_prefix` alone. explicit: give segments even where
        the text has none, because a mask by position would hide or show the wrong columns.
        """
        if self.n == 0:
            return segments, positions
        if segments is None and (explicit or self.rows is not None):
            segments = torch.ones_like(positions).expand(1 if self.rows is None else len(self.rows), -1)
        shift = self.n if self.rows is None else self.global_prefix[:, None]
        positions = positions + shift  # (S,) or (B, S)
        first = torch.arange(self.n, device=positions.device).expand(*positions.shape[:-1], -1)
        return None if segments is None else F.pad(segments, (self.n, 0)), torch.cat([first, positions], dim=-1)

    def prepend(self, x: Tensor) -> Tensor:
        """The embeddings that enter in this call, and x (B, T, E) after them."""
        if self.embeddings is None:
            return x
        return torch.cat([self.embeddings.to(x.dtype).expand(x.shape[0], -1, -1), x], dim=1)


def n_virtual(model: nn.Module) -> int:
    """The positions that virtual tokens take from the text's context: the size of the largest set in the model."""
    return max((module.n_tokens for module in model.modules() if isinstance(module, VirtualTokens)), default=0)


def context_of(model: nn.Module) -> int:
    """Tokens of text that the model reads at once: its context less the virtual tokens of adapters."""
    return model.config.max_seq_len - n_virtual(model)


NO_PREFIX = VirtualPrefix()


def virtual_prefix(virtual: VirtualTokens | None, *, is_first_call: bool) -> VirtualPrefix:
    """The prefix of one call; is_first_call: whether it is the first of its rows, whose tokens are not in a cache yet."""
    if virtual is None or virtual.is_off():
        return NO_PREFIX
    if not is_first_call:
        return VirtualPrefix(virtual.n_tokens, virtual.rows())
    return VirtualPrefix(virtual.n_tokens, virtual.rows(), virtual.embeddings(), virtual.layers())


class Interleaved(NamedTuple):
    """Rows of an encoder with the virtual tokens before each document, which sees them and which they see.

    index            (B, S), what stands in each column: 0 .. n-1 a virtual token, n .. n+T-1 a token of the text, n+T nothing
    segments         (B, S), the documents, to which their virtual tokens belong; None: one per row
    token_positions  (B, T), the column of each token of the text
    """

    index: Tensor
    segments: Tensor | None
    token_positions: Tensor

    def insert(self, embeddings: Tensor, x: Tensor) -> Tensor:
        """x (B, T, E) with the virtual embeddings (P, E) inserted, (B, S, E)."""
        B, _, E = x.shape
        parts = torch.cat([embeddings.to(x.dtype).expand(B, -1, -1), x, x.new_zeros(B, 1, E)], dim=1)
        return parts.gather(1, self.index[..., None].expand(-1, -1, E))

    def text(self, hidden: Tensor) -> Tensor:
        """The hidden states of the text alone, (B, S, C) -> (B, T, C)."""
        return hidden.gather(1, self.token_positions[..., None].expand(-1, -1, hidden.shape[-1]))


def interleave(segments: Tensor | None, virtual: VirtualPrefix, B: int, T: int, device: torch.device) -> Interleaved:
    """The layout of rows with these segments (B, T), or one document each, when n virtual tokens stand before each document.

    A text token moves right by n for every document that begins up to it; S is the longest row after that.
    """
    n, text = virtual.n, torch.arange(T, device=device).expand(B, -1)
    if segments is None and virtual.rows is None:
        return Interleaved(torch.arange(n + T, device=device).expand(B, -1), None, text + n)
    # columns of the text
    segments = torch.ones_like(text) if segments is None else segments
    is_first = (positions_from_segments(segments) == 0) & (segments != 0)  # (B, T)
    if virtual.rows is not None:
        is_first = is_first & virtual.rows[:, None]
    n_documents = is_first.cumsum(1)
    token_positions = text + n * n_documents
    S = T + n * int(n_documents[:, -1].max())
    index = torch.full((B, S), n + T, device=device).scatter(1, token_positions, text + n)
    interleaved_segments = torch.zeros(B, S, dtype=segments.dtype, device=device).scatter(1, token_positions, segments)
    # columns of the virtual tokens: the n before the first token of each document
    row, column = is_first.nonzero(as_tuple=True)  # (N,) documents
    virtual_ids = torch.arange(n, device=device)
    columns = token_positions[row, column][:, None] - n + virtual_ids  # (N, n)
    index[row[:, None], columns] = virtual_ids
    interleaved_segments[row[:, None], columns] = segments[row, column][:, None]
    return Interleaved(index, interleaved_segments, token_positions)


def distance_bias(relative: RelativeBias | None, n_alibi: int, positions: Tensor, T: int) -> Tensor | None:
    """T5's or ALiBi's bias of the last T of S tokens from their positions (S,) or (B, S), (B or 1, H, T, S); None without both.

    Needed where distances between positions are not distances between columns: virtual tokens before packed documents,
    and completions that share a prompt.
    """
    if relative is None and n_alibi == 0:
        return None
    positions = positions if positions.dim() == 2 else positions[None]
    distance = positions[:, None, :] - positions[:, -T:, None]  # (B or 1, T, S)
    if relative is None:
        return -alibi_slopes(n_alibi, device=distance.device)[:, None, None] * distance.abs()[:, None]
    sizes = {"n_buckets": relative.n_buckets, "max_distance": relative.max_distance}
    bucket = relative_bucket(distance, causal=relative.causal, **sizes)
    return relative.table(bucket).movedim(-1, 1)
