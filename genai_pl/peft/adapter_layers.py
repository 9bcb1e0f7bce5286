"""Adapter layers around one weight: they look like the layer that they wrap, and can be merged into it.

The rest of the package reads `weight`, `bias`, `in_features` and `out_features` of linear layers (the chunked loss multiplies
by the head's weight itself), so a wrapped layer must have them too.
"""

from copy import deepcopy

import torch
from torch import Tensor, nn

from genai_pl.errors import ConfigError
from genai_pl.models import WrappedDecoder
from genai_pl.models.experts import ExpertLinear
from genai_pl.peft.adapter import Adapter, AdapterLayer
from genai_pl.peft.targets import SCORE_LAYERS, adapter_layers, base_module, module_sites

State = dict[str, Tensor]  # the parameters of one layer, by name


class WeightAdapter(AdapterLayer):
    """Base class of layers whose effect on their base equals another weight and bias of that base.

    base: the wrapped layer, which may be an adapter layer itself. A subclass implements `forward` and `merged`, and `weight` or
    `bias` where the head may be its base.
    """

    def __init__(self, base: nn.Module, adapter: Adapter) -> None:
        super().__init__()
        self.base, self.adapter = base, adapter

    @property
    def in_features(self) -> int:
        """Size of the input, as of a linear layer."""
        return self.base.in_features

    @property
    def out_features(self) -> int:
        """Size of the output, as of a linear layer."""
        return self.base.out_features

    @property
    def weight(self) -> Tensor:
        """The weight of the base, unchanged."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        """The bias of the base, unchanged."""
        return self.base.bias

    def merged(self, state: State) -> State:
        """The parameters with which the base alone would compute what this layer computes.

        state: parameters of the innermost module by name, in float32, already merged with the layers inside this one. The result
        is a new dict whose unchanged values are the same tensors, so that `merge` leaves those parameters alone.
        """
        raise NotImplementedError


class TrainedCopy(WeightAdapter):
    """A full copy of the base that is trained while the base stays frozen: PEFT's modules_to_save.

    copy: the module that is trained. A weight between 0 and 1 interpolates base and copy.
    """

    def __init__(self, base: nn.Module, adapter: Adapter) -> None:
        super().__init__(base, adapter)
        self.copy = deepcopy(base_module(base)).requires_grad_(True)

    def forward(self, x: Tensor, *rest: Tensor | None) -> Tensor | tuple[Tensor, ...]:
        """rest: further inputs of the base; a router takes its bias, and returns a tuple."""
        if self.adapter.is_off:
            return self.base(x, *rest)
        if self._is_whole:
            return self.copy(x, *rest)
        y = self.base(x, *rest)
        if isinstance(y, tuple):
            raise ConfigError(
                "an adapter that trains a router is on or off: it has no weights between 0 and 1, or by row"
            )
        return y + self.adapter.scale(y) * (self.copy(x, *rest) - y)

    @property
    def weight(self) -> Tensor:
        """The weight in effect now, by the adapter's switch; the chunked loss multiplies by it."""
        return self._now("weight")

    @property
    def bias(self) -> Tensor | None:
        """The bias in effect now, or None."""
        return None if self.base.bias is None else self._now("bias")

    def merged(self, state: State) -> State:
        copied = dict(self.copy.named_parameters())
        return {name: value + self.adapter.weight * (copied[name] - value) for name, value in state.items()}

    @property
    def _is_whole(self) -> bool:
        """True if the copy alone is in effect, in all rows."""
        return self.adapter.rows is None and self.adapter.weight == 1.0

    def _now(self, name: str) -> Tensor:
        """Parameter `name` of base and copy, interpolated."""
        base, copied = getattr(self.base, name), getattr(self.copy, name)
        if self.adapter.is_off or self._is_whole:
            return base if self.adapter.is_off else copied
        return base + scalar_weight(self) * (copied - base)


def scalar_weight(layer: WeightAdapter) -> float:
    """The weight of a layer's adapter, for the loss, which multiplies all rows by one matrix; ConfigError if rows differ.

    Embeddings are the exception: with weights by row they return rows from `forward`, and nobody reads their `weight`.
    """
    if layer.adapter.rows is not None and isinstance(base_module(layer), nn.Linear):
        raise ConfigError(
            f"adapters by row: the head is part of {layer.adapter.method}, so rows need logits, not a loss"
        )
    return 1.0 if layer.adapter.rows is not None else layer.adapter.weight


def train_whole(model: nn.Module, names: list[str], adapter: Adapter) -> None:
    """Wrap the layers with these names in `TrainedCopy`; copies of tied parameters are tied too.

    names: of layers, as `ModuleSite.is_called` takes them. A head that scores texts is always added: it is new in this model, so
    the base holds only its initialization. ConfigError for unknown names and for layers that the adapter wraps already.
    """
    names = [*names, *score_layers(model)]
    # every name must mean a layer that has parameters of its own
    places = [site for site in module_sites(model) if site.parameters]
    for name in names:
        if not any(site.is_called(name) for site in places):
            leaves = ", ".join(dict.fromkeys(site.leaf for site in places))
            raise ConfigError(f"peft.modules_to_save: no layer with weights is called {name}; there are: {leaves}")
    # one copy of each parameter, however many layers hold it
    shared: dict[nn.Parameter, nn.Parameter] = {}
    for site in places:
        if not any(map(site.is_called, names)):
            continue
        if any(layer.adapter is adapter for layer in adapter_layers(site.module)):
            raise ConfigError(f"peft.modules_to_save: {site.leaf} is one of peft.target_modules too; name it in one")
        if isinstance(site.inner, ExpertLinear):
            raise ConfigError(f"peft.modules_to_save: {site.leaf} are experts; adapt them by peft.target_modules")
        layer = TrainedCopy(site.module, adapter)
        for name, parameter in base_module(layer).named_parameters():
            setattr(layer.copy, name, shared.setdefault(parameter, getattr(layer.copy, name)))
        site.replace(layer)


def score_layers(model: nn.Module) -> list[str]:
    """Names of the layers of a head for labels; none without such a head."""
    if not model.config.head.scores:
        return []
    if model.config.score_transform:
        return [SCORE_LAYERS[0], "transform.dense", "transform.norm"]
    return list(SCORE_LAYERS if model.config.score_dense else SCORE_LAYERS[:1])


def tie_weights(model: nn.Module) -> None:
    """Tie head and embedding again after loading, as `model.tie_weights` does, but below adapter layers.

    Copies that an adapter trains are tied too if their values are equal; two copies that were trained apart stay apart.
    """
    wrapped = isinstance(model, WrappedDecoder)
    tied = model.inner.config.tie_word_embeddings if wrapped else model.config.tie_embeddings
    if not tied or model.lm_head is None:
        return
    base_module(model.lm_head).weight = base_module(model.embed).weight
    copies = {id(layer.adapter): layer.copy for layer in adapter_layers(model.embed) if isinstance(layer, TrainedCopy)}
    for layer in adapter_layers(model.lm_head):
        twin = copies.get(id(layer.adapter)) if isinstance(layer, TrainedCopy) else None
        if twin is not None and torch.equal(twin.weight, layer.copy.weight):
            layer.copy.weight = twin.weight


def new_parameter(like: Tensor, *shape: int) -> nn.Parameter:
    """A trainable parameter of zeros on the device of `like`, in float32 at least.

    Steps of an optimizer are smaller than what bf16 resolves near 1 (2^-8), so in bf16 most of them would be lost.
    """
    return nn.Parameter(like.new_zeros(shape, dtype=torch.promote_types(like.dtype, torch.float32)))
