"""BitFit (Ben Zaken et al. 2022): only the biases that a model already has are trained.

The change of each bias is a parameter of its own beside the frozen bias, so the adapter can be turned off and saved alone.
"""

from torch import Tensor, nn

from genai_pl.errors import ConfigError
from genai_pl.peft.adapter import Adapter
from genai_pl.peft.adapter_layers import State, WeightAdapter, new_parameter, scalar_weight, score_layers, train_whole
from genai_pl.peft.targets import base_module, module_sites


class TrainedBias(WeightAdapter):
    """base(x) + shift, where `shift` (out,) starts at zero; the bias of the base stays frozen."""

    def __init__(self, base: nn.Module, adapter: Adapter) -> None:
        super().__init__(base, adapter)
        self.shift = new_parameter(base_module(base).bias, *base_module(base).bias.shape)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if self.adapter.is_off:
            return y
        return y + (self.adapter.scale(y) * self.shift).to(y.dtype)

    @property
    def bias(self) -> Tensor:
        """The bias in effect now, which the chunked loss adds itself if the base is the head."""
        if self.adapter.is_off:
            return self.base.bias
        return self.base.bias + (scalar_weight(self) * self.shift).to(self.base.bias.dtype)

    def merged(self, state: State) -> State:
        return {**state, "bias": state["bias"] + self.adapter.weight * self.shift}


def bitfit(model: nn.Module) -> nn.Module:
    """The model, frozen except for changes of the biases of its linear layers and LayerNorms; ConfigError if it has none."""
    # every bias must be in a layer that TrainedBias can wrap
    kinds = (nn.Linear, nn.LayerNorm)
    head = score_layers(model)
    sites = [site for site in module_sites(model) if "bias" in site.parameters and not any(map(site.is_called, head))]
    unsupported = [type(site.inner).__name__ for site in sites if not isinstance(site.inner, kinds)]
    if unsupported:
        raise ConfigError(f"peft=bitfit: the bias of a {unsupported[0]} cannot be trained; choose peft=lora")
    if not sites:
        raise ConfigError(
            "peft=bitfit: this model has no biases (GPT, BERT, RoBERTa and XLNet have, and Qwen2 some; Llama and T5 "
            "have none): choose peft=lora, or train a model with model.bias=true"
        )
    # freeze the base, then wrap: parameters made afterwards are trainable
    adapter = Adapter("bitfit", {})
    model.requires_grad_(False)
    for site in sites:
        site.replace(TrainedBias(site.module, adapter))
    train_whole(model, [], adapter)
    return model
