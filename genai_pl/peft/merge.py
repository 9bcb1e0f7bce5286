"""Merging: adapters added to the weights that they wrap, which leaves a plain model as fast as its base."""

import copy
from dataclasses import replace

import torch
from torch import nn

from genai_pl.errors import ConfigError
from genai_pl.models import EncoderDecoder, WrappedDecoder
from genai_pl.models.frozen import hold_frozen_in_32_bits
from genai_pl.peft.adapter import AdapterLayer
from genai_pl.peft.adapter_layers import WeightAdapter
from genai_pl.peft.quantize import dequantize
from genai_pl.peft.targets import adapter_layers, base_module, module_sites
from genai_pl.progress import progress_bar


def merge(model: nn.Module) -> nn.Module:
    """The model without adapter layers, computing what it computed with them, all parameters trainable.

    ConfigError for adapters that are no change of a weight (bottleneck, prefix, prompt). A quantized base is dequantized first,
    and stays so: the sum of a 4-bit weight and a LoRA product has no 4-bit form.
    """
    for module in model.modules():
        if isinstance(module, AdapterLayer) and not isinstance(module, WeightAdapter):
            raise ConfigError(f"peft={module.adapter.method} cannot be merged into weights: export with format=peft")
    hold_frozen_in_32_bits(model)
    found = [(site, layers) for site in module_sites(dequantize(model)) if (layers := adapter_layers(site.module))]
    with progress_bar(len(found), "merging", unit=" layers") as bar:
        for site, layers in found:
            site.replace(_merged(layers))
            bar.update()
    _settle_ties(model)
    return model.requires_grad_(True)


@torch.no_grad()
def merged_copy(model: nn.Module) -> nn.Module:
    """A copy with the effect of the adapters in its weights, which shares all memory that no adapter changes.

    For reading, while the model stays as it is: nothing of it has gradients, and a step of an optimizer changes both. Adapters
    that are no change of a weight stay where they are, and weights in other dtypes than float32 are no part of this.
    """
    shared = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    copied = copy.deepcopy(model, shared | {id(buffer): buffer for buffer in model.buffers()})
    for site in module_sites(copied):
        layers = adapter_layers(site.module)
        if layers and all(isinstance(layer, WeightAdapter) for layer in layers):
            site.replace(_merged(layers))
    _settle_ties(copied)
    return copied.requires_grad_(False)


@torch.no_grad()
def _merged(layers: list[WeightAdapter]) -> nn.Module:
    """The innermost module with new parameters where the layers change them; sums are computed in float32."""
    module = base_module(layers[0])
    parameters = dict(module.named_parameters())
    state = {name: p.to(torch.promote_types(p.dtype, torch.float32)) for name, p in parameters.items()}
    before = dict(state)
    # from the innermost layer out, as in the forward pass
    for layer in reversed(layers):
        state = layer.merged(state)
    for name, value in state.items():
        if value is not before[name]:
            setattr(module, name, nn.Parameter(value.to(parameters[name].dtype)))
    return module


def _settle_ties(model: nn.Module) -> None:
    """Restore the tie of head and embedding, or record in the configuration that they differ now.

    An adapter on one of the two makes them differ; with tie_embeddings still true, saving would drop the head.
    """
    inner = model.inner.config if isinstance(model, WrappedDecoder) else None
    tied = inner.tie_word_embeddings if inner else model.config.tie_embeddings
    if not tied or model.lm_head is None or model.lm_head.weight is model.embed.weight:
        return
    # equal: tie again. Different: say so, in whichever configuration this kind of model has
    if torch.equal(model.lm_head.weight, model.embed.weight):
        model.tie_weights()
    elif inner:
        inner.tie_word_embeddings = model.config.values["tie_word_embeddings"] = False
    else:
        for part in (model, model.decoder) if isinstance(model, EncoderDecoder) else (model,):
            part.config = replace(part.config, tie_embeddings=False)
