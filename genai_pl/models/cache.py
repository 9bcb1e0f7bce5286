"""The keys and values of the past, in buffers of fixed size."""

import torch
from torch import Tensor

from genai_pl.specs import ModelConfig


class KVCache:
    """Keys and values of every layer for up to `max_length` tokens; the model advances it, the caller passes it."""

    def __init__(
        self, config: ModelConfig, batch_size: int, max_length: int, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        size = (config.n_decoder_layer or config.n_layer, batch_size, config.n_kv_head, max_length, config.head_dim)
        self.k = torch.zeros(size, device=device, dtype=dtype)
        self.v = torch.zeros(size, device=device, dtype=dtype)
        self.length = 0
        self.n_virtual = 0  # of them, in front, tokens that are no text
        self.max_length = max_length
        self.source: dict[int, tuple[Tensor, Tensor]] = {}  # by layer, of the text that a decoder reads beside its own
        self._segments: Tensor | None = None

    @property
    def n_text(self) -> int:
        """Tokens of the text that it holds."""
        return self.length - self.n_virtual

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, K, S, D) of the past and of the T new tokens, which are stored."""
        end = self._end(k.shape[2])
        self.k[layer, :, :, self.length : end] = k
        self.v[layer, :, :, self.length : end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]

    def segments(self, new: Tensor | None, n_new: int) -> Tensor | None:
        """Segment ids (B, S) of the past and of the new text, or None as long as no call has given any.

        New tokens without ids belong to the document that each row ended in.
        """
        if new is None and self._segments is None:
            return None
        if self._segments is None:
            size = (self.k.shape[1], self.max_length)
            self._segments = torch.ones(size, device=self.k.device, dtype=torch.long)
        self._end(n_new)
        start, end = self.n_text, self.n_text + n_new
        last = self._segments[:, start - 1 : start]  # (B, 1)
        self._segments[:, start:end] = last if new is None else new
        return self._segments[:, :end]

    def advance(self, n_new: int, n_virtual: int = 0) -> None:
        """Count the new tokens, and virtual ones before them, as past, once every layer has stored them."""
        self.length += n_virtual + n_new
        self.n_virtual += n_virtual

    def keep_rows(self, rows: Tensor) -> None:
        """Reorder or drop rows of the batch, (B',) indices."""
        self.k, self.v = self.k[:, rows], self.v[:, rows]
        self.source = {layer: (k[rows], v[rows]) for layer, (k, v) in self.source.items()}
        if self._segments is not None:
            self._segments = self._segments[rows]

    def reorder(self, rows: Tensor) -> None:
        """Let each row go on from another one that reads the same source, (B,) indices; no memory is added."""
        end = self.length
        self.k[:, :, :, :end] = self.k[:, rows, :, :end]
        self.v[:, :, :, :end] = self.v[:, rows, :, :end]
        if self._segments is not None:
            self._segments = self._segments[rows]

    def rewind(self, n: int) -> None:
        """Forget the last n tokens; fewer than it has of text."""
        self.length -= n

    def _end(self, n_new: int) -> int:
        if self.length + n_new > self.max_length:
            raise ValueError(f"the cache holds {self.max_length} tokens, {self.length + n_new} were given")
        return self.length + n_new
