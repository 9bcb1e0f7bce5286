"""WrappedCache: the past of rows that a model of transformers continues, as tokens and as its own cache."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel


class WrappedCache:
    """The tokens of B rows, their segment ids, and the cache of transformers that holds what the layers keep of them.

    max_length: the most tokens that a caller will ask for; the cache itself has no end. length: tokens of each row.
    inner: transformers' cache; None before the first tokens, where the model keeps none, and after a rewind that it cannot
    follow (a recurrent state has no way back): the next call then computes all tokens again.
    """

    def __init__(self, max_length: int) -> None:
        self.inner: Cache | None = None
        self.max_length, self.length = max_length, 0
        self.tokens: Tensor | None = None
        self._segments: Tensor | None = None

    def extend(self, new: Tensor, segments: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """All tokens (B, S) with the new ones (B, T), and their segment ids, or None as long as none were given."""
        self.tokens = new if self.tokens is None else torch.cat([self.tokens, new], dim=1)
        B, T = new.shape
        if segments is not None or self._segments is not None:
            if self._segments is None:
                self._segments = torch.ones(B, self.length, dtype=torch.long, device=new.device)
            segments = self._segments[:, -1:].expand(B, T) if segments is None else segments
            self._segments = torch.cat([self._segments, segments], dim=1)
        self.length += T
        return self.tokens, self._segments

    def keep_rows(self, rows: Tensor) -> None:
        """Reorder, repeat or drop rows of the batch, (B',) indices."""
        self.tokens = self.tokens[rows]
        self._segments = None if self._segments is None else self._segments[rows]
        if self.inner is not None:
            self.inner.reorder_cache(rows)

    reorder = keep_rows

    def rewind(self, n: int) -> None:
        """Forget the last n tokens."""
        self.length -= n
        self.tokens = self.tokens[:, : self.length]
        self._segments = None if self._segments is None else self._segments[:, : self.length]
        if self.inner is not None:
            self.inner = _cropped(self.inner, n)


def new_inner_cache(inner: "PreTrainedModel", *, keeps_all: bool) -> "Cache":
    """An empty cache of transformers with what each layer of the model needs.

    keeps_all: windowed layers keep all keys, as our masks count them; transformers' own attention keeps its window.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    try:
        cache = DynamicCache(config=inner.config)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):  # a configuration without kinds of layers
        return DynamicCache()
    if keeps_all:
        if all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers):
            return DynamicCache()
        cache.layers = [DynamicLayer() if type(x) is DynamicSlidingWindowLayer else x for x in cache.layers]
    return cache


def _cropped(cache: "Cache", n: int) -> "Cache | None":
    """The cache without the last n tokens; None where a layer keeps a state instead of tokens, or only a window of them."""
    from transformers.cache_utils import DynamicLayer

    if any(type(layer) is not DynamicLayer for layer in cache.layers):
        return None
    cache.crop(-n)
    return cache
