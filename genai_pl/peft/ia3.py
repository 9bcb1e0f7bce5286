"""IA3 (Liu et al. 2022, section 3.3): keys, values and the hidden units of the MLP are multiplied by learned vectors.

The vectors start at 1. A scale on hidden units sits on the input of down_proj; all others sit on the output of their layer.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from genai_pl.errors import ConfigError
from genai_pl.peft.adapter import Adapter
from genai_pl.peft.adapter_layers import State, WeightAdapter, new_parameter, train_whole
from genai_pl.peft.targets import listed, match

FEEDFORWARD = ("down_proj",)
TARGETS = ("k_proj", "v_proj", *FEEDFORWARD)


class IA3Linear(WeightAdapter):
    """scale * base(x), or base(scale * x) where the scale is on the input; (..., in) -> (..., out).

    scale: (out,) or (in,), initially 1. on_input: which of the two.
    """

    def __init__(self, base: nn.Module, adapter: Adapter, *, on_input: bool) -> None:
        super().__init__(base, adapter)
        self.on_input = on_input
        self.scale = new_parameter(self.weight, self.weight.shape[1 if on_input else 0])
        nn.init.ones_(self.scale)

    def forward(self, x: Tensor) -> Tensor:
        if self.adapter.is_off:
            return self.base(x)
        if self.on_input:
            return self.base(self._scaled(x))
        return self._scaled(self.base(x))

    def merged(self, state: State) -> State:
        # diag(scale) W on the output, W diag(scale) on the input
        scale = 1 + self.adapter.weight * (self.scale - 1)
        if self.on_input:
            return {**state, "weight": state["weight"] * scale}
        # the bias of the base is part of the output that is scaled
        return {name: value * (scale[:, None] if value.dim() == 2 else scale) for name, value in state.items()}

    def _scaled(self, x: Tensor) -> Tensor:
        """x times the scale, interpolated towards 1 by the adapter's weight."""
        return x * (1 + self.adapter.scale(x) * (self.scale - 1)).to(x.dtype)


def ia3(
    model: nn.Module,
    *,
    target_modules: str | Sequence[str] | None = None,
    feedforward_modules: Sequence[str] | None = None,
    modules_to_save: Sequence[str] | None = None,
) -> nn.Module:
    """The model, frozen, with a learned scale on each target; on the input of those that feedforward_modules names.

    target_modules: see `targets.match`; None for k_proj, v_proj and down_proj. feedforward_modules: None for down_proj.
    modules_to_save: layers trained as full copies.
    """
    named = {"target_modules": target_modules, "feedforward_modules": feedforward_modules}
    options = {name: listed(value) for name, value in (named | {"modules_to_save": modules_to_save}).items()}
    adapter = Adapter("ia3", options)
    targets = match(model, target_modules, default=TARGETS)
    inner = FEEDFORWARD if feedforward_modules is None else options["feedforward_modules"]
    # a scale on the input must be one of the targets
    for name in options["feedforward_modules"] or []:
        if not any(site.is_called(name) for site in targets):
            leaves = ", ".join(dict.fromkeys(site.leaf for site in targets))
            raise ConfigError(f"peft.feedforward_modules: {name} is none of peft.target_modules: {leaves}")
    model.requires_grad_(False)
    for site in targets:
        site.replace(IA3Linear(site.module, adapter, on_input=any(map(site.is_called, inner))))
    train_whole(model, options["modules_to_save"] or [], adapter)
    return model


def ones_like_output(module: nn.Module) -> Tensor:
    """The scale (out,) that changes nothing, for a part of a joined layer that has no adapter."""
    return torch.ones_like(module.weight[:, 0])
