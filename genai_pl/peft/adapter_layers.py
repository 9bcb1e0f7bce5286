"""What the adapter layers of one weight share: they look like the layer they wrap, and can be folded into it."""

from copy import deepcopy

import torch
from torch import Tensor, nn

from genai_pl.config.enums import Head
from genai_pl.errors import ConfigError
from genai_pl.models import WrappedDecoder
from genai_pl.peft.adapter import Adapter, AdapterLayer
from genai_pl.peft.targets import adapter_layers, base_module, module_sites

State = dict[str, Tensor]  # the parameters of one layer, by name


class WeightAdapter(AdapterLayer):
    """A layer whose effect on its base is that of another weight and bias."""

    def __init__(self, base: nn.Module, adapter: Adapter) -> None:
        super().__init__()
        self.base, self.adapter = base, adapter

    @property
    def in_features(self) -> int:
        return self.base.in_features

    @property
    def out_features(self) -> int:
        return self.base.out_features

    @property
    def weight(self) -> Tensor:
        """The base's."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        """The base's."""
        return self.base.bias

    def merged(self, state: State) -> State:
        """The parameters with which the base alone does what this layer does, given those of what it wraps."""
        raise NotImplementedError


class TrainedCopy(WeightAdapter):
    """A copy of the base that is trained whole, while the base stays what it was."""

    def __init__(self, base: nn.Module, adapter: Adapter) -> None:
        super().__init__(base, adapter)
        self.copy = deepcopy(base_module(base)).requires_grad_(True)

    def forward(self, x: Tensor) -> Tensor:
        if self.adapter.is_off:
            return self.base(x)
        if self._is_whole:
            return self.copy(x)
        y = self.base(x)
        return y + self.adapter.scale(y) * (self.copy(x) - y)

    @property
    def weight(self) -> Tensor:
        """What the layer multiplies by now; the loss reads it of a head."""
        return self._now("weight")

    @property
    def bias(self) -> Tensor | None:
        """What the layer adds now."""
        return None if self.base.bias is None else self._now("bias")

    def merged(self, state: State) -> State:
        copied = dict(self.copy.named_parameters())
        return {name: value + self.adapter.weight * (copied[name] - value) for name, value in state.items()}

    @property
    def _is_whole(self) -> bool:
        return self.adapter.rows is None and self.adapter.weight == 1.0

    def _now(self, name: str) -> Tensor:
        base, copied = getattr(self.base, name), getattr(self.copy, name)
        if self.adapter.is_off or self._is_whole:
            return base if self.adapter.is_off else copied
        return base + scalar_weight(self) * (copied - base)


def scalar_weight(layer: WeightAdapter) -> float:
    """The weight of an adapter where one matrix must serve all rows."""
    if layer.adapter.rows is not None and isinstance(base_module(layer), nn.Linear):
        raise ConfigError(
            f"adapters by row: the head is part of {layer.adapter.method}, so rows need logits, not a loss"
        )
    return 1.0 if layer.adapter.rows is not None else layer.adapter.weight


def train_whole(model: nn.Module, names: list[str], adapter: Adapter) -> None:
    """Wrap the layers of these names so that a copy of each is trained; what shares a weight goes on sharing it.

    A head that scores texts is always among them: the base has only its first draw.
    """
    names = [*names, "score"] if model.config.head is Head.score else names
    places = [site for site in module_sites(model) if site.parameters]
    for name in names:
        if not any(site.is_called(name) for site in places):
            leaves = ", ".join(dict.fromkeys(site.leaf for site in places))
            raise ConfigError(f"peft.modules_to_save: no layer with weights is called {name}; there are: {leaves}")
    shared: dict[nn.Parameter, nn.Parameter] = {}
    for site in places:
        if not any(map(site.is_called, names)):
            continue
        if any(layer.adapter is adapter for layer in adapter_layers(site.module)):
            raise ConfigError(f"peft.modules_to_save: {site.leaf} is one of peft.target_modules too; name it in one")
        layer = TrainedCopy(site.module, adapter)
        for name, parameter in base_module(layer).named_parameters():
            setattr(layer.copy, name, shared.setdefault(parameter, getattr(layer.copy, name)))
        site.replace(layer)


def tie_weights(model: nn.Module) -> None:
    """What `model.tie_weights` does, around adapters: tie the base's head again, and copies that are still equal."""
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
    """Zeros where `like` is, in float32 at least: a step on bf16 weights would be lost in rounding."""
    return nn.Parameter(like.new_zeros(shape, dtype=torch.promote_types(like.dtype, torch.float32)))
