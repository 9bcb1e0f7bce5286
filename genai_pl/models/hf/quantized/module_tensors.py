"""ModuleTensors: the tensors of a file that stand for one weight, and what a format has to tell of them."""

import json
from collections.abc import Callable, Collection
from typing import NamedTuple, Protocol

from torch import Tensor

from genai_pl.errors import CheckpointError

Shape = tuple[int, ...]


class Reader(Protocol):
    """Tensors by name, one at a time (`folder.TensorFiles`)."""

    def shape(self, name: str) -> Shape:
        """The shape of a tensor."""

    def read(self, name: str) -> Tensor:
        """The tensor."""


class ModuleTensors(NamedTuple):
    """The tensors whose names begin with `stem` ("model.layers.0.mlp.up_proj."), by the rest of their names.

    reader: of the file. names: those of all its tensors.
    """

    reader: Reader
    stem: str
    names: Collection[str]

    def has(self, end: str) -> bool:
        """True if there is a tensor of that end."""
        return self.stem + end in self.names

    def shape(self, end: str) -> Shape:
        """Its shape, from the header of the file."""
        return self.reader.shape(self.stem + end)

    def read(self, end: str) -> Tensor:
        """The tensor."""
        return self.reader.read(self.stem + end)

    def maybe(self, end: str) -> Tensor | None:
        """The tensor, or None if there is none."""
        return self.read(end) if self.has(end) else None

    def json(self, end: str) -> dict:
        """The object whose JSON is the bytes of a tensor."""
        try:
            return dict(json.loads(bytes(self.read(end).tolist())))
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{self.stem}{end}: no object in JSON ({error})") from None


class Format(NamedTuple):
    """How files hold a packed weight.

    mark: the end of a name that only packed weights have ("qweight"); what is before it is their stem. end: that of the
    weight itself. shape, unpack: of parts; the weight is float32 unless its numbers fit into 16 bits. extra: ends of
    further tensors of such a module that a product of plain numbers does not need.
    """

    mark: str
    shape: Callable[[ModuleTensors], Shape]
    unpack: Callable[[ModuleTensors], Tensor]
    end: str = "weight"
    extra: tuple[str, ...] = ()
