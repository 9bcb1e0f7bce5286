"""LoRA as GGUF: the two factors of each adapted matrix under llama.cpp's names, which it adds to a base as it runs.

llama.cpp computes W x + s B A x with A (R, in), B (out, R), and s = 1 where the file states no alpha: scalings are in B here, so
that parts of one matrix (GPT-2's q, k, v) may have different ones.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from genai_pl.errors import ConfigError
from genai_pl.models.hf.families import Weight
from genai_pl.peft.adapter import AdapterLayer, adapters_of
from genai_pl.peft.io.experts import block_diagonal
from genai_pl.peft.lora import LoRALinear
from genai_pl.peft.targets import ModuleSite, adapter_layers, module_sites

MERGED = "format=gguf merges this adapter into the model"
EMBEDDING = "embed.weight"


@torch.no_grad()
def gguf_factors(model: nn.Module, rows: Iterable[Weight]) -> dict[str, Tensor]:
    """The factors by the names of a file, float32; ConfigError for what is no plain LoRA of one adapter.

    rows: the table of the base model's architecture.
    """
    n = len(adapters_of(model))
    if n != 1:
        advice = MERGED.replace("this adapter", "several") if n else "format=gguf writes the model"
        raise ConfigError(f"format=gguf_lora writes one adapter, and this model has {n}; {advice}")
    for module in model.modules():
        plain = isinstance(module, LoRALinear) and module.magnitude is None
        if isinstance(module, AdapterLayer) and not plain:
            kind = "DoRA" if isinstance(module, LoRALinear) else f"{type(module).__name__}"
            raise ConfigError(f"format=gguf_lora: llama.cpp has LoRA alone, and this adapter has {kind}; {MERGED}")
    sites = {f"{name}.weight": site for site in module_sites(model) for name in site.names}
    factors: dict[str, Tensor] = {}
    for row in rows:
        layers = [_layer(sites.get(name)) for name in row.names]
        if not any(layers):
            continue
        if EMBEDDING in row.names:
            raise ConfigError(f"format=gguf_lora: the embedding has no LoRA in llama.cpp; {MERGED}")
        A, B = zip(*(_factors(layer, sites[name]) for layer, name in zip(layers, row.names, strict=True)), strict=True)
        factors[f"{row.hf_name}.lora_a"] = torch.cat(A, dim=-2).float()
        factors[f"{row.hf_name}.lora_b"] = row.to_hf(block_diagonal(list(B)).float())
    return factors


def _layer(site: ModuleSite | None) -> LoRALinear | None:
    """The adapter layer at a site, or None."""
    layers = [] if site is None else adapter_layers(site.module)
    return layers[0] if layers else None


def _factors(layer: LoRALinear | None, site: ModuleSite) -> tuple[Tensor, Tensor]:
    """A, and B with the scaling in it; without rows and columns where there is no adapter."""
    if layer is None:
        weight = site.inner.weight
        return weight.new_zeros(0, weight.shape[-1]), weight.new_zeros(weight.shape[-2], 0)
    A, B = layer.factors()
    return A, B * layer.scaling
