"""Bottleneck adapters (Houlsby et al. 2019; Pfeiffer et al. 2021): a small residual MLP after attention and MLP of a block.

The second linear layer starts at zero, so the model starts as its base. The effect is no change of a weight: it cannot be
merged, and PEFT has no counterpart, so files are in our own names (io/native.py).
"""

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
    """y + up(act(down(y))) for y = base(...), (B, T, C); of a base that returns a tuple, y is the first item.

    width: C. size: hidden units. activation: "relu" or "gelu". Wraps a whole attention or MLP module, of ours or transformers'.
    """

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
        """y plus the output of the small MLP, computed in the adapter's dtype."""
        x = y if torch.is_autocast_enabled(y.device.type) else y.to(self.down.weight.dtype)
        return y + (self.adapter.scale(y) * self.up(self.activation(self.down(x)))).to(y.dtype)


def bottleneck(model: nn.Module, *, size: int = 64, after: str = "both", activation: str = "relu") -> nn.Module:
    """The model, frozen, with an adapter after each block's MLP and, for after="both", after its attention too.

    size: hidden units of the adapter. after: "both" (Houlsby) or "mlp" (Pfeiffer). activation: "relu" or "gelu".
    """
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
    """The sites, directly in a block, with one of these names; ConfigError if no block has any."""
    blocks = {id(base_module(block)) for block in model.blocks}
    sites = [s for s in module_sites(model) if s.leaf in names and any(id(parent) in blocks for parent, _ in s.holders)]
    if not sites:
        parts = ", ".join(name for name, _ in base_module(model.blocks[0]).named_children())
        raise ConfigError(f"peft=bottleneck: no block has a part called {' or '.join(names)}; they have: {parts}")
    return sites


def _linear(like: Tensor, n_in: int, n_out: int) -> nn.Linear:
    """A linear layer on the device of `like`, in float32 at least."""
    dtype = new_parameter(like, 1).dtype
    return nn.Linear(n_in, n_out, device=like.device, dtype=dtype)
