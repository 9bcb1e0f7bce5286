"""Family, Weight and Codec: the parts of a table that translates a family of Hugging Face models."""

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from genai_pl.config.enums import Activation, Head
from genai_pl.config.model import ModelConfig

Values = Mapping[str, object]


class Weight(NamedTuple):
    """One tensor of a Hugging Face file and our tensors that it holds, concatenated along the output dimension.

    hf_name     in the file; {i} stands for a layer
    names       ours, in the order in which the file's tensor holds them (GPT-2's c_attn: q, k, v)
    transposed  the file stores (in, out), as GPT-2's Conv1D does, or (experts, in, out)
    interleaved our tensors, of all experts each, alternate by output in the file's (gpt-oss: gate and up projection)
    head_dim    the file splits our last dimension in two (before transposing): heads, head_dim
    leading     this many dimensions of 1 stand first in the file
    offset      our tensor is the file's plus this (Gemma's norms multiply by 1 + weight)
    layers      the layers that have it; None: all
    expert      our tensors are 3-D, and the file's is this slice of them; a table writes {e} in hf_name instead
    pair_heads  heads of a query or key projection whose outputs the file orders by rotary pairs (GGUF's llama)

    >>> row = Weight("c_fc.weight", ("up_proj.weight",), transposed=True)
    >>> import torch; row.from_hf(torch.zeros(2, 3)).shape, row.to_hf(torch.zeros(3, 2)).shape
    (torch.Size([3, 2]), torch.Size([2, 3]))
    """

    hf_name: str
    names: tuple[str, ...]
    transposed: bool = False
    head_dim: int | None = None
    leading: int = 0
    offset: float = 0.0
    layers: tuple[int, ...] | None = None
    expert: int | None = None
    interleaved: bool = False
    pair_heads: int | None = None

    def from_hf(self, tensor: Tensor) -> Tensor:
        """Our tensors, concatenated, from the file's tensor."""
        tensor = tensor.reshape(tensor.shape[self.leading :]) if self.leading else tensor
        tensor = tensor.flatten(-2) if self.head_dim else tensor
        tensor = tensor.mT.contiguous() if self.transposed else tensor
        if self.interleaved:  # (E, n out, ...) -> (n E, out, ...)
            tensor = torch.cat([tensor[:, part :: len(self.names)] for part in range(len(self.names))])
        if self.pair_heads:  # (H D/2 2, ...) -> (H 2 D/2, ...)
            tensor = tensor.unflatten(0, (self.pair_heads, -1, 2)).transpose(1, 2).flatten(0, 2)
        return tensor + self.offset if self.offset else tensor

    def to_hf(self, tensor: Tensor) -> Tensor:
        """The file's tensor from ours, concatenated; the inverse of `from_hf`."""
        tensor = tensor - self.offset if self.offset else tensor
        if self.pair_heads:
            tensor = tensor.unflatten(0, (self.pair_heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        if self.interleaved:
            tensor = torch.stack(tensor.chunk(len(self.names)), dim=2).flatten(1, 2)
        tensor = tensor.mT if self.transposed else tensor
        tensor = tensor.unflatten(-1, (-1, self.head_dim)) if self.head_dim else tensor
        return tensor.reshape((1,) * self.leading + tuple(tensor.shape)).contiguous()


SCORE = "score.weight"  # in every class of decoders with a head for scores


class Codec(NamedTuple):
    """Two functions for fields that do not have one key each, or must be checked; ConfigError for what is not supported.

    read   config.json, with defaults filled in -> fields of ModelConfig
    write  ModelConfig -> keys of config.json
    keys   of config.json that `read` looks at
    """

    read: Callable[[Values], dict[str, object]]
    write: Callable[[ModelConfig], dict[str, object]]
    keys: tuple[str, ...]


@dataclass(frozen=True)
class Family:
    """A model family: its model_type and classes, its keys of config.json, and its tensors.

    The fields are commented below. Reading fills a missing key from `defaults`, demands `constants`, maps `fields` and calls
    the codecs; every other key is kept in `ModelConfig.extra` and written again.
    """

    model_type: str
    architectures: dict[Head, tuple[str, ...]]  # classes of transformers with each head; the first is written
    fixed: dict[str, object]  # fields of ModelConfig that have this value in every member
    fields: dict[str, str]  # field of ModelConfig -> key of config.json
    constants: dict[str, object]  # further keys that must have this value, which is also transformers' default
    defaults: dict[str, object]  # transformers' values for keys that config.json leaves out
    weights: Callable[[ModelConfig], Iterable[Weight]]  # {i} is a layer, {j} a layer of the decoder of two stacks
    codecs: tuple[Codec, ...] = ()
    dropouts: tuple[str, ...] = ()  # keys that are written, and do not matter when reading
    prefix: str = ""  # of names in a model with a head, absent in one without
    head_bias: bool = False  # True if the language model's head has tensors that are never tied
    score_bias: bool = False  # True if the head for scores of texts has a bias, and a dense layer before it
    score_transform: bool = (
        False  # True if the head for scores has the layers of the language model's head before it, and a bias
    )
    head_tensor: str = "lm_head.weight"  # a tensor that only a file of the model with its head holds
    pooler: str = ""  # the name of the dense layer over the first state, where its classes have one
    ties: tuple[tuple[str, str], ...] = ()  # (tensor, tensor that it equals unless the file holds both and they differ)
    always_ties: bool = False  # whatever tie_word_embeddings says
    synonyms: tuple[tuple[str, str], ...] = ()  # other names of keys, and the keys
    quantizations: tuple[str, ...] | None = (
        None  # values of quant_method whose tensors are read; None: all that are known
    )

    @property
    def keys(self) -> set[str]:
        """Keys of config.json that this table reads or writes."""
        coded = {key for codec in self.codecs for key in codec.keys}
        return {*self.fields.values(), *self.constants, *self.defaults, *coded, *(name for name, _ in self.synonyms)}

    def rows(self, config: ModelConfig) -> Iterator[Weight]:
        """Every tensor of a model of this configuration, one row for each layer and expert."""
        counts = {"{i}": 1 if config.share_layers else config.n_layer, "{j}": config.n_decoder_layer or 0}
        pooler = both(self.pooler, "pooler") if config.pooler else ()
        for row in (*self.weights(config), *pooler):
            count = next((n for mark, n in counts.items() if mark in row.names[0]), 1)
            hf_name = row.hf_name.removeprefix(self.prefix) if config.head is Head.none else row.hf_name
            experts = range(config.n_experts) if "{e}" in hf_name else (None,)
            for i, expert in product(range(count) if row.layers is None else row.layers, experts):
                names = tuple(name.format(i=i, j=i) for name in row.names)
                yield row._replace(hf_name=hf_name.format(i=i, j=i, e=expert), names=names, expert=expert)

    def table(self, config: ModelConfig) -> list[Weight]:
        """`rows` as a list."""
        return list(self.rows(config))

    def head_of(self, values: Values, stored: Container[str] | None) -> Head:
        """The head of the model in a folder: that of the class in `architectures`, else the one whose tensors are stored.

        values: config.json. stored: names of tensors, None if unknown. A headless class may still come with a head: folders
        of embedding models state the base class and hold whatever they were made from.
        """
        class_names = values.get("architectures") or []
        first, *other_heads = self.architectures
        head = next((h for h, classes in self.architectures.items() if any(n in classes for n in class_names)), None)
        if head not in (None, Head.none) or Head.none not in other_heads:
            return head or first
        if head is None and stored is not None and Head.score in other_heads and SCORE in stored:
            return Head.score
        if values.get("tie_word_embeddings") and not self.head_bias:
            return first  # it is the embedding
        if head is Head.none or stored is None:
            return Head.none if class_names else first
        return first if self.head_tensor in stored else Head.none


def both(hf_name: str, *names: str, **layout: object) -> tuple[Weight, Weight]:
    """The rows of a linear layer or norm: weight and bias; `layout` are the further fields of the weight's row."""
    weight = Weight(f"{hf_name}.weight", tuple(f"{name}.weight" for name in names), **layout)
    return weight, Weight(f"{hf_name}.bias", tuple(f"{name}.bias" for name in names))


def one(hf_name: str, *names: str, **layout: object) -> Weight:
    """The row of a weight without bias."""
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
