"""What a family's table consists of."""

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from genai_pl.config.enums import Activation, Head
from genai_pl.config.model import ModelConfig

Values = Mapping[str, object]


class Weight(NamedTuple):
    """One tensor of theirs and the tensors of ours that it holds, joined along the output dimension."""

    hf_name: str
    names: tuple[str, ...]
    transposed: bool = False  # theirs is (in, out)
    head_dim: int | None = None  # theirs has two dimensions for the last of ours (before transposing): heads, head_dim
    leading: int = 0  # theirs has so many leading dimensions of 1
    offset: float = 0.0  # ours is theirs plus this

    def from_hf(self, tensor: Tensor) -> Tensor:
        """Theirs as ours."""
        tensor = tensor.reshape(tensor.shape[self.leading :]) if self.leading else tensor
        tensor = tensor.flatten(-2) if self.head_dim else tensor
        tensor = tensor.T.contiguous() if self.transposed else tensor
        return tensor + self.offset if self.offset else tensor

    def to_hf(self, tensor: Tensor) -> Tensor:
        """Ours as theirs."""
        tensor = tensor - self.offset if self.offset else tensor
        tensor = tensor.T if self.transposed else tensor
        tensor = tensor.unflatten(-1, (-1, self.head_dim)) if self.head_dim else tensor
        return tensor.reshape((1,) * self.leading + tuple(tensor.shape)).contiguous()


SCORE = "score.weight"  # of every class of decoders that scores texts


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
    head_bias: bool = False  # whether the head of the language model has tensors that are never another's
    head_tensor: str = "lm_head.weight"  # one that only a file of the model with that head holds
    pooler: str = ""  # the name of the dense layer over the first state, where its classes have one
    ties: tuple[tuple[str, str], ...] = ()  # tensors that are another one's, unless a file holds both and they differ
    always_ties: bool = False  # whatever tie_word_embeddings says
    synonyms: tuple[tuple[str, str], ...] = ()  # other names of keys, and the keys

    @property
    def keys(self) -> set[str]:
        """Keys of config.json that have a meaning here."""
        coded = {key for codec in self.codecs for key in codec.keys}
        return {*self.fields.values(), *self.constants, *self.defaults, *coded, *(name for name, _ in self.synonyms)}

    def rows(self, config: ModelConfig) -> Iterator[Weight]:
        """Every tensor of a model of this configuration, layers written out."""
        counts = {"{i}": 1 if config.share_layers else config.n_layer, "{j}": config.n_decoder_layer or 0}
        pooler = both(self.pooler, "pooler") if config.pooler else ()
        for row in (*self.weights(config), *pooler):
            count = next((n for mark, n in counts.items() if mark in row.names[0]), 1)
            hf_name = row.hf_name.removeprefix(self.prefix) if config.head is Head.none else row.hf_name
            for i in range(count):
                names = tuple(name.format(i=i, j=i) for name in row.names)
                yield row._replace(hf_name=hf_name.format(i=i, j=i), names=names)

    def table(self, config: ModelConfig) -> list[Weight]:
        """The same as a list."""
        return list(self.rows(config))

    def head_of(self, values: Values, stored: Container[str] | None) -> Head:
        """The head of the class that wrote config.json; where none of its classes is ours, the one that the file has."""
        class_names = values.get("architectures") or []
        first, *other_heads = self.architectures
        head = next((h for h, classes in self.architectures.items() if any(n in classes for n in class_names)), None)
        if head not in (None, Head.none) or Head.none not in other_heads:
            return head or first
        if head is None and stored is not None and Head.score in other_heads and SCORE in stored:
            return Head.score
        if values.get("tie_word_embeddings") and not self.head_bias:
            return first  # which is the embedding
        if head is Head.none or stored is None:
            return Head.none if class_names else first
        return first if self.head_tensor in stored else Head.none


def both(hf_name: str, *names: str, **layout: object) -> tuple[Weight, Weight]:
    """A linear layer or norm: its weight and its bias."""
    weight = Weight(f"{hf_name}.weight", tuple(f"{name}.weight" for name in names), **layout)
    return weight, Weight(f"{hf_name}.bias", tuple(f"{name}.bias" for name in names))


def one(hf_name: str, *names: str, **layout: object) -> Weight:
    """A weight without bias."""
    return Weight(f"{hf_name}.weight", tuple(f"{name}.weight" for name in names), **layout)


ACTIVATIONS = {
    "gelu_new": Activation.gelu_tanh,
    "gelu_pytorch_tanh": Activation.gelu_tanh,
    "gelu": Activation.gelu,
    "silu": Activation.silu,
    "swish": Activation.silu,
    "relu": Activation.relu,
    "relu2": Activation.relu2,
}
