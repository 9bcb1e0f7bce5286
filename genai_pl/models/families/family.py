"""What a family's table consists of."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from genai_pl.names import Activation, Head
from genai_pl.specs import ModelConfig

Values = Mapping[str, object]


class Weight(NamedTuple):
    """One tensor of theirs and the tensors of ours that it holds, joined along the output dimension."""

    theirs: str
    ours: tuple[str, ...]
    transposed: bool = False  # theirs is (in, out)
    head_dim: int | None = None  # theirs has two dimensions for the last of ours (before transposing): heads, head_dim
    leading: int = 0  # theirs has so many leading dimensions of 1
    skipped: int = 0  # theirs has so many rows that ours lacks, at the beginning
    offset: float = 0.0  # ours is theirs plus this
    instead: str | None = None  # what is read where theirs is missing

    def read(self, tensor: Tensor) -> Tensor:
        """Theirs as ours."""
        tensor = tensor.reshape(tensor.shape[self.leading :]) if self.leading else tensor
        tensor = tensor.flatten(-2) if self.head_dim else tensor
        tensor = tensor.T.contiguous() if self.transposed else tensor
        return tensor[self.skipped :] + self.offset if self.offset else tensor[self.skipped :]

    def write(self, tensor: Tensor) -> Tensor:
        """Ours as theirs."""
        tensor = tensor - self.offset if self.offset else tensor
        if self.skipped:
            padded = tensor.new_zeros(tensor.shape[0] + self.skipped, *tensor.shape[1:])
            padded[self.skipped :] = tensor
            tensor = padded
        tensor = tensor.T if self.transposed else tensor
        tensor = tensor.unflatten(-1, (-1, self.head_dim)) if self.head_dim else tensor
        return tensor.reshape((1,) * self.leading + tuple(tensor.shape)).contiguous()


class Codec(NamedTuple):
    """Fields that are said otherwise than by one key each; ConfigError from either for what cannot be said."""

    read: Callable[[Values], dict[str, object]]  # config.json with its defaults -> fields
    write: Callable[[ModelConfig], dict[str, object]]
    keys: tuple[str, ...]  # of config.json that it reads


@dataclass(frozen=True)
class Family:
    """A model family: what must hold, which field is called what, and where each tensor lies."""

    model_type: str
    architectures: dict[Head, tuple[str, ...]]  # classes of transformers with each head; the first is written
    fixed: dict[str, object]  # fields of ModelConfig that have this value in every member
    fields: dict[str, str]  # field of ModelConfig -> key of config.json
    constants: dict[str, object]  # further keys that must have this value, which is also transformers' default
    defaults: dict[str, object]  # what transformers assumes where config.json is silent
    weights: Callable[[ModelConfig], Iterable[Weight]]  # {i} is a layer, {j} a layer of the decoder of two stacks
    codecs: tuple[Codec, ...] = ()
    dropouts: tuple[str, ...] = ()  # keys that are written, and do not matter when reading
    prefix: str = ""  # of names in a model with a head, absent in one without
    head_bias: bool = False

    def table(self, config: ModelConfig) -> list[Weight]:
        """Every tensor of a model of this configuration, layers written out."""
        counts = {"{i}": 1 if config.share_layers else config.n_layer, "{j}": config.n_decoder_layer or 0}
        rows = []
        for row in self.weights(config):
            count = next((n for mark, n in counts.items() if mark in row.ours[0]), 1)
            theirs = row.theirs.removeprefix(self.prefix) if config.head is Head.none else row.theirs
            for i in range(count):
                names = tuple(name.format(i=i, j=i) for name in row.ours)
                rows.append(row._replace(theirs=theirs.format(i=i, j=i), ours=names))
        return rows

    def head_of(self, values: Values) -> Head:
        """The head of the class that wrote config.json; where it does not say, the one with a head."""
        named = values.get("architectures") or []
        for head, classes in self.architectures.items():
            if any(name in classes for name in named):
                return head
        if Head.none in self.architectures and named:
            return Head.none
        return next(iter(self.architectures))


def both(theirs: str, *ours: str, **how: object) -> tuple[Weight, Weight]:
    """A linear layer or norm: its weight and its bias."""
    weight = Weight(f"{theirs}.weight", tuple(f"{name}.weight" for name in ours), **how)
    return weight, Weight(f"{theirs}.bias", tuple(f"{name}.bias" for name in ours))


def one(theirs: str, *ours: str, **how: object) -> Weight:
    """A weight without bias."""
    return Weight(f"{theirs}.weight", tuple(f"{name}.weight" for name in ours), **how)


ACTIVATIONS = {
    "gelu_new": Activation.gelu_tanh,
    "gelu_pytorch_tanh": Activation.gelu_tanh,
    "gelu": Activation.gelu,
    "silu": Activation.silu,
    "relu": Activation.relu,
    "relu2": Activation.relu2,
}
