"""What adapters share: a switch for all layers of one, and how to turn them off, mix them, or choose one for each row."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count

from torch import Tensor, nn


@dataclass
class Adapter:
    """One adapter of a model: which method with which options made it, and how much of it counts now."""

    method: str  # the option of the group `peft`
    options: dict[str, object]
    weight: float = 1.0  # 0: the base alone
    rows: Tensor | None = field(default=None, repr=False)  # (B,) weights, one per row of the batch, instead
    number: int = field(default_factory=count().__next__, repr=False, compare=False)  # later ones are greater

    @property
    def is_off(self) -> bool:
        return self.rows is None and self.weight == 0.0

    def scale(self, like: Tensor) -> Tensor | float:
        """What a layer multiplies its share by, shaped to broadcast over `like` (B, ...)."""
        if self.rows is None:
            return self.weight
        return self.rows.to(like.dtype).view(-1, *(1,) * (like.dim() - 1))


class AdapterLayer(nn.Module):
    """A part of a model that belongs to an adapter; what it wraps, if anything, is its `base`."""

    adapter: Adapter


def adapters_of(model: nn.Module) -> list[Adapter]:
    """The adapters of a model, the first one first."""
    adapters: dict[int, Adapter] = {}
    for module in model.modules():
        if isinstance(module, AdapterLayer):
            adapters[id(module.adapter)] = module.adapter
    return sorted(adapters.values(), key=lambda adapter: adapter.number)  # the outermost, the last, is met first


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """The base alone inside: the reference policy of preference learning, without a second copy of it."""
    adapters = adapters_of(model)
    saved = [(adapter.weight, adapter.rows) for adapter in adapters]
    for adapter in adapters:
        adapter.weight, adapter.rows = 0.0, None
    try:
        yield
    finally:
        for adapter, (weight, rows) in zip(adapters, saved, strict=True):
            adapter.weight, adapter.rows = weight, rows
