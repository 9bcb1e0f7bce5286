"""Virtual tokens: what prompt and prefix tuning put in front of every document."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genai_pl.kernels import positions_from_segments
from genai_pl.models.positions import alibi_slopes
from genai_pl.models.relative_positions import RelativeBias, relative_bucket


class VirtualTokens(nn.Module):
    """Learned tokens at positions 0 .. n_tokens - 1 of every document; those of its text come after.

    They are embeddings that pass through all layers (Lester et al. 2021), or keys and values of each layer's attention
    (Li and Liang 2021): a subclass gives one of the two.
    """

    n_tokens: int

    def is_off(self) -> bool:
        """Whether the model is to run as if there were none."""
        raise NotImplementedError

    def rows(self) -> Tensor | None:
        """Which rows of the batch have them, (B,) bool; None: all."""
        raise NotImplementedError

    def embeddings(self) -> Tensor | None:
        """(P, embedding_size)."""
        return None

    def layers(self) -> Tensor | None:
        """Keys and values of all layers, (L, 2, K, P, D)."""
        return None


class VirtualPrefix(NamedTuple):
    """The virtual tokens as one call meets them: n take room in front of each row's text, and `rows` see them."""

    n: int = 0
    rows: Tensor | None = None  # (B,) bool; None: all
    embeddings: Tensor | None = None  # (P, embedding_size), if they enter in this call
    layers: Tensor | None = None  # (L, 2, K, P, D), if they do

    @property
    def global_prefix(self) -> int | Tensor | None:
        """How many keys each row sees whatever document a query is of, as `AttentionMask` takes it."""
        if self.rows is None:
            return self.n or None
        return self.n * self.rows.long()

    @property
    def n_queries(self) -> int:
        """How many are queries in this call."""
        return 0 if self.embeddings is None else self.n

    def prepend_positions(
        self, segments: Tensor | None, positions: Tensor, *, explicit: bool
    ) -> tuple[Tensor | None, Tensor]:
        """Segments (B, S) and positions (S,) or (B, S) of a text with the virtual tokens before it, (..., n + S).

        They belong to no document; `explicit` wants segments even where none are needed.
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
        """The embeddings that enter, and then x (B, T, E)."""
        if self.embeddings is None:
            return x
        return torch.cat([self.embeddings.to(x.dtype).expand(x.shape[0], -1, -1), x], dim=1)


def n_virtual(model: nn.Module) -> int:
    """How many places of the context virtual tokens take from the text."""
    return max((module.n_tokens for module in model.modules() if isinstance(module, VirtualTokens)), default=0)


NO_PREFIX = VirtualPrefix()


def virtual_prefix(virtual: VirtualTokens | None, *, enters: bool) -> VirtualPrefix:
    """What stands in front of a row: nothing if there are no virtual tokens, or if they are off."""
    if virtual is None or virtual.is_off():
        return NO_PREFIX
    if not enters:
        return VirtualPrefix(virtual.n_tokens, virtual.rows())
    return VirtualPrefix(virtual.n_tokens, virtual.rows(), virtual.embeddings(), virtual.layers())


class Interleaved(NamedTuple):
    """Rows in which the virtual tokens stand before each document: there they see it, as it sees them."""

    index: Tensor  # (B, S) into the virtual tokens, then the text, then nothing
    segments: Tensor | None  # (B, S)
    token_positions: Tensor  # (B, T) where the text is

    def insert(self, embeddings: Tensor, x: Tensor) -> Tensor:
        """The embeddings (P, E) among x (B, T, E), (B, S, E)."""
        B, _, E = x.shape
        parts = torch.cat([embeddings.to(x.dtype).expand(B, -1, -1), x, x.new_zeros(B, 1, E)], dim=1)
        return parts.gather(1, self.index[..., None].expand(-1, -1, E))

    def text(self, hidden: Tensor) -> Tensor:
        """The hidden states of the text alone, (B, S, C) -> (B, T, C)."""
        return hidden.gather(1, self.token_positions[..., None].expand(-1, -1, hidden.shape[-1]))


def interleave(segments: Tensor | None, virtual: VirtualPrefix, B: int, T: int, device: torch.device) -> Interleaved:
    """Where the virtual tokens go in rows of these segments (B, T), or of one document each."""
    n, text = virtual.n, torch.arange(T, device=device).expand(B, -1)
    if segments is None and virtual.rows is None:
        return Interleaved(torch.arange(n + T, device=device).expand(B, -1), None, text + n)
    segments = torch.ones_like(text) if segments is None else segments
    is_first = (positions_from_segments(segments) == 0) & (segments != 0)  # (B, T)
    if virtual.rows is not None:
        is_first = is_first & virtual.rows[:, None]
    n_documents = is_first.cumsum(1)
    token_positions = text + n * n_documents
    S = T + n * int(n_documents[:, -1].max())
    index = torch.full((B, S), n + T, device=device).scatter(1, token_positions, text + n)
    interleaved_segments = torch.zeros(B, S, dtype=segments.dtype, device=device).scatter(1, token_positions, segments)
    row, column = is_first.nonzero(as_tuple=True)  # (N,) documents
    virtual_ids = torch.arange(n, device=device)
    columns = token_positions[row, column][:, None] - n + virtual_ids  # (N, n)
    index[row[:, None], columns] = virtual_ids
    interleaved_segments[row[:, None], columns] = segments[row, column][:, None]
    return Interleaved(index, interleaved_segments, token_positions)


def distance_bias(relative: RelativeBias | None, n_alibi: int, positions: Tensor, T: int) -> Tensor | None:
    """T5's bias or ALiBi's of the last T of S keys by their positions (S,) or (B, S), (B or 1, H, T, S); None without both."""
    if relative is None and n_alibi == 0:
        return None
    positions = positions if positions.dim() == 2 else positions[None]
    distance = positions[:, None, :] - positions[:, -T:, None]  # (B or 1, T, S)
    if relative is None:
        return -alibi_slopes(n_alibi, device=distance.device)[:, None, None] * distance.abs()[:, None]
    sizes = {"n_buckets": relative.n_buckets, "max_distance": relative.max_distance}
    bucket = relative_bucket(distance, causal=relative.causal, **sizes)
    return relative.table(bucket).movedim(-1, 1)
