"""Bottleneck adapters (Houlsby et al. 2019; Pfeiffer et al. 2021): a small MLP with residual after a part of a block."""

import torch
from torch import Tensor, nn

from genai_pl.errors import ConfigError
from genai_pl.peft.adapter import Adapter, AdapterLayer
from genai_pl.peft.adapter_layers import new_parameter, train_whole
from genai_pl.peft.targets import ModuleSite, base_module, module_sites

ATTENTION, MLP = ("attention", "self_attn", "attn"), ("mlp",)
PARTS = {"both": (ATTENTION, MLP), "mlp": (MLP,)}
ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU}


class Bottleneck(AdapterLayer):
    """y + up(act(down(y))) for y = base(...), (B, T, C); where the base gives a tuple, y is the first of it."""

    def __init__(self, base: nn.Module, adapter: Adapter, *, width: int, size: int, activation: str) -> None:
        super().__init__()
        self.base, self.adapter = base, adapter
        like = next(base.parameters())
        self.down = _linear(like, width, size)
        self.up = _linear(like, size, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)
        self.activation = ACTIVATIONS[activation]()

    def forward(self, *args: object, **kwargs: object) -> Tensor | tuple:
        y = self.base(*args, **kwargs)
        if self.adapter.is_off:
            return y
        return (self._adapted(y[0]), *y[1:]) if isinstance(y, tuple) else self._adapted(y)

    def _adapted(self, y: Tensor) -> Tensor:
        x = y if torch.is_autocast_enabled(y.device.type) else y.to(self.down.weight.dtype)
        return y + (self.adapter.scale(y) * self.up(self.activation(self.down(x)))).to(y.dtype)


def bottleneck(model: nn.Module, *, size: int = 64, after: str = "both", activation: str = "relu") -> nn.Module:
    """The model, frozen, with an adapter after the MLP of every block and, for after="both", after attention too."""
    if after not in PARTS:
        raise ConfigError(f"peft.after={after} is not one of {', '.join(PARTS)}")
    if activation not in ACTIVATIONS:
        raise ConfigError(f"peft.activation={activation} is not one of {', '.join(ACTIVATIONS)}")
    if size < 1:
        raise ConfigError(f"peft.size must be above 0, not {size}")
    adapter = Adapter("bottleneck", {"size": size, "after": after, "activation": activation})
    parts = [site for names in PARTS[after] for site in _parts(model, names)]
    model.requires_grad_(False)
    for site in parts:
        site.replace(Bottleneck(site.module, adapter, width=model.config.n_embd, size=size, activation=activation))
    train_whole(model, [], adapter)
    return model


def _parts(model: nn.Module, names: tuple[str, ...]) -> list[ModuleSite]:
    blocks = {id(base_module(block)) for block in model.blocks}
    sites = [s for s in module_sites(model) if s.leaf in names and any(id(parent) in blocks for parent, _ in s.holders)]
    if not sites:
        parts = ", ".join(name for name, _ in base_module(model.blocks[0]).named_children())
        raise ConfigError(f"peft=bottleneck: no block has a part called {' or '.join(names)}; they have: {parts}")
    return sites


def _linear(like: Tensor, n_in: int, n_out: int) -> nn.Linear:
    dtype = new_parameter(like, 1).dtype
    return nn.Linear(n_in, n_out, device=like.device, dtype=dtype)
