"""The cache of a model that transformers runs."""

import torch
from torch import Tensor


class WrappedCache:
    """A cache of transformers that grows, with the segments of what it holds."""

    def __init__(self, max_length: int) -> None:
        from transformers import DynamicCache

        self.inner = DynamicCache()  # without the configuration: it keeps all keys, and the mask hides old ones
        self.max_length, self.length = max_length, 0
        self._segments: Tensor | None = None

    def segments(self, new: Tensor | None, B: int, T: int, device: torch.device) -> Tensor | None:
        """Segment ids (B, S) of the past and of the new tokens, or None as long as none were given."""
        if new is None and self._segments is None:
            return None
        if self._segments is None:
            self._segments = torch.ones(B, self.length, dtype=torch.long, device=device)
        new = self._segments[:, -1:].expand(B, T) if new is None else new
        self._segments = torch.cat([self._segments, new], dim=1)
        return self._segments

    def keep_rows(self, rows: Tensor) -> None:
        """Reorder, repeat or drop rows of the batch, (B',) indices."""
        self.inner.batch_select_indices(rows)
        self._segments = None if self._segments is None else self._segments[rows]

    def reorder(self, rows: Tensor) -> None:
        """Let each row go on from another one, (B,) indices."""
        self.keep_rows(rows)

    def rewind(self, n: int) -> None:
        """Forget the last n tokens."""
        self.length -= n
        self.inner.crop(-n)
        self._segments = None if self._segments is None else self._segments[:, : self.length]
