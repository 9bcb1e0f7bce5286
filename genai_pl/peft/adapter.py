"""Adapter switches: the object that all layers of one adapter share, which turns them off, scales them, or selects rows.

The reference policy of DPO and PPO is the model with its adapters off, so no second copy of the base is in memory; several
adapters can be mixed by their weights, or serve different rows of one batch.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count

from torch import Tensor, nn


@dataclass
class Adapter:
    """One adapter of a model.

    method: name of the option in the group `peft`. options: its arguments, as plain data; a file stores them.
    weight: factor on the adapter's effect, 0 for the base alone; virtual tokens know 0 and 1 only.
    rows: (B,) weights by batch row instead of `weight`, set for one forward pass (`RowWeights`), or None.
    number: rises with each adapter made, which orders the adapters of a model.
    """

    method: str
    options: dict[str, object]
    weight: float = 1.0
    rows: Tensor | None = field(default=None, repr=False)
    number: int = field(default_factory=count().__next__, repr=False, compare=False)

    @property
    def is_off(self) -> bool:
        """True if no row has any effect of the adapter, so that layers may skip their work."""
        return self.rows is None and self.weight == 0.0

    def scale(self, like: Tensor) -> Tensor | float:
        """The factor on a layer's change: a number, or weights by row (B, 1, ...) that broadcast over `like` (B, ...)."""
        if self.rows is None:
            return self.weight
        return self.rows.to(like.dtype).view(-1, *(1,) * (like.dim() - 1))


class RowWeights:
    """Weights of adapters by batch row, an argument of decoding: each row of one batch can have an adapter of its own.

    `Adapter.rows` holds them only inside `applied`, which surrounds one forward pass: layers deep in a model, transformers'
    models among them, have no other way to receive an argument. Outside, the model has no weights by row. Code that selects or
    repeats rows of the batch must `select` the same rows of this object.

    pairs: (adapter, (B,) weights); other adapters of the model keep their own weight.

    >>> import torch
    >>> first, second = Adapter("lora", {}), Adapter("lora", {})
    >>> weights = RowWeights([(first, torch.tensor([1.0, 0.0])), (second, torch.tensor([0.0, 1.0]))])
    >>> with weights.select(torch.tensor([1, 1, 0])).applied():
    ...     first.rows.tolist(), second.rows.tolist()
    ([0.0, 0.0, 1.0], [1.0, 1.0, 0.0])
    >>> first.rows is None
    True
    """

    def __init__(self, pairs: Sequence[tuple[Adapter, Tensor]]) -> None:
        self.pairs = list(pairs)

    def select(self, rows: Tensor) -> "RowWeights":
        """The weights of the given rows, (n,) indices, which may repeat."""
        return RowWeights([(adapter, weights[rows]) for adapter, weights in self.pairs])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Context manager: the layers of these adapters use the weights by row inside."""
        before = [adapter.rows for adapter, _ in self.pairs]
        for adapter, weights in self.pairs:
            adapter.rows = weights
        try:
            yield
        finally:
            for (adapter, _), rows in zip(self.pairs, before, strict=True):
                adapter.rows = rows


class AdapterLayer(nn.Module):
    """Base class of the modules that belong to an adapter.

    adapter: the switch. A layer that wraps a module has it as its attribute `base`; names of parameters under `base.` are then
    the base's, all others the adapter's. Several files rely on that prefix.
    """

    adapter: Adapter


def adapters_of(model: nn.Module) -> list[Adapter]:
    """The adapters of a model, in the order in which they were added."""
    adapters: dict[int, Adapter] = {}
    for module in model.modules():
        if isinstance(module, AdapterLayer):
            adapters[id(module.adapter)] = module.adapter
    return sorted(
        adapters.values(), key=lambda adapter: adapter.number
    )  # modules() meets the outermost, which is the latest, first


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """Context manager: the base alone inside, for the log-probabilities of a reference policy. Afterwards all is as before."""
    adapters = adapters_of(model)
    saved = [(adapter.weight, adapter.rows) for adapter in adapters]
    for adapter in adapters:
        adapter.weight, adapter.rows = 0.0, None
    try:
        yield
    finally:
        for adapter, (weight, rows) in zip(adapters, saved, strict=True):
            adapter.weight, adapter.rows = weight, rows
