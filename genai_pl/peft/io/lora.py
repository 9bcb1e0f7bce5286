"""LoRA and DoRA files: several layers here may be one module in transformers, as q, k and v are in GPT-2's c_attn.

Written jointly: the parts' A are stacked, their B form a block-diagonal matrix, so B A is the parts' changes stacked. PEFT's
own adapter on c_attn has one A that all parts share; it is read into parts with equal A.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from genai_pl.errors import CheckpointError
from genai_pl.peft.adapter import Adapter
from genai_pl.peft.adapter_layers import TrainedCopy
from genai_pl.peft.io.experts import block_diagonal, flat, nested, unflat, unnested
from genai_pl.peft.io.hf_names import PREFIX, SHARED, HFModule, hf_modules
from genai_pl.peft.io.lora_config import (
    Size,
    as_plain_lora,
    check_config,
    options_of,
    size_in,
    size_of,
    to_config,
)
from genai_pl.peft.io.modules_to_save import (
    layer_type,
    load_saved_modules,
    saved_module_names,
    saved_module_tensors,
)
from genai_pl.peft.io.tensors import AdapterFile, Key, TensorReader, common_config, fill, layer_of, make
from genai_pl.peft.lora import LoRALinear, lora

A, B, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"
KINDS = (A, B, MAGNITUDE, "weight", "bias")


def write_lora(model: nn.Module, adapter: Adapter) -> AdapterFile:
    """The adapter in PEFT's layout, PiSSA as plain LoRA of twice the rank."""
    tensors: dict[str, Tensor] = {}
    sizes: dict[str, Size] = {}
    saved_modules: list[HFModule] = []
    options = as_plain_lora(adapter.options)
    modules = hf_modules(model)
    # factors of adapted modules, and tensors of fully trained ones
    for module in modules:
        layers = [layer_of(site, adapter) for site in module.parts]
        kind = layer_type(module, layers)
        if kind is TrainedCopy:
            saved_modules.append(module)
            tensors |= {
                f"{PREFIX}{module.name}.{name}": value for name, value in saved_module_tensors(module, layers).items()
            }
        elif kind is not None:
            scaling, factors = _join_factors(module, layers)
            sizes[module.name] = size_of(scaling, factors[A].shape[-2], rslora=options["rslora"])
            if module.n_experts:
                factors[A], factors[B] = flat(factors[A], factors[B])
            tensors |= {f"{PREFIX}{module.name}.{name}": value for name, value in factors.items()}
    # the config follows from the tensors: rank and alpha per module, and suffixes that select just these modules
    transposed = any(module.transposed for module in modules if module.name in sizes)
    parameters = [module.name for module in modules if module.n_experts and not module.weights]
    config = common_config(model, "LORA") | to_config(options, sizes, [module.name for module in modules], parameters)
    config |= {"fan_in_fan_out": transposed, "modules_to_save": saved_module_names(saved_modules)}
    return AdapterFile(config, nested(tensors, {PREFIX + name for name in parameters}), options)


def read_lora(model: nn.Module, file: AdapterFile) -> nn.Module:
    """The model with the adapter of a file that genai_pl or PEFT wrote."""
    check_config(file.config)
    modules = hf_modules(model)
    file = replace(file, tensors=unnested(file.tensors, file.config.get("target_parameters") or ()))
    tensors = TensorReader(file, modules, KINDS)
    # options from the metadata, or inferred from PEFT's config and the shapes of its tensors
    for names in SHARED.values():
        tensors.check_equal(names, "weight")
    ours = file.options is not None
    options = file.options if ours else _options(file.config, modules, tensors)
    adapter = make(model, lora, options)
    # the sites have changed: their modules are wrapped now
    for module in hf_modules(model):
        layers = [layer_of(site, adapter) for site in module.parts]
        if any(isinstance(layer, LoRALinear) for layer in layers):
            _fill_factors(module, layers, tensors, blocks=ours)
        elif any(layer is not None for layer in layers):
            load_saved_modules(module, layers, tensors)
    tensors.finish()
    return model


@torch.no_grad()
def _join_factors(module: HFModule, layers: list[LoRALinear | None]) -> tuple[float, dict[str, Tensor]]:
    """Scaling, and A, B and DoRA magnitude of one module of transformers; parts without an adapter get rows of zeros.

    One module has one scaling: those of other parts are multiplied into their B.
    """
    present = [layer for layer in layers if layer is not None]
    scaling = present[0].scaling
    blocks, magnitudes = [], []
    for site, layer in zip(module.parts, layers, strict=True):
        weight = site.inner.weight
        if layer is None:
            blocks.append(present[0].lora_B.new_zeros(*weight.shape[:-1], 0))
            magnitudes.append(weight.norm(dim=-1))
        else:
            blocks.append(layer.factors()[1] * (layer.scaling / scaling))
            magnitudes.append(layer.magnitude)
    factors = {
        A: torch.cat([layer.factors()[0] for layer in present], dim=-2),
        B: module.joined(block_diagonal(blocks), -2),
    }
    if present[0].magnitude is not None:
        factors[MAGNITUDE] = module.joined(torch.cat(magnitudes, dim=-1), -1)
    return scaling, factors


def _fill_factors(module: HFModule, layers: list[LoRALinear | None], tensors: TensorReader, *, blocks: bool) -> None:
    """Copy A, B and magnitude of one module into its parts.

    blocks: True where A is stacked and B block-diagonal, as `write_lora` makes them: a part takes its rows of A and its block of
    B. False for PEFT's: each part takes all of A and its rows of B.
    """
    a, b = tensors.pop(module.name, A), tensors.pop(module.name, B)
    if module.n_experts:
        a, b = unflat(a, b, module.n_experts)
    present = [layer for layer in layers if layer is not None]
    ranks = [layer.rank if layer else 0 for layer in layers]
    magnitudes = [None] * len(layers)
    if present[0].magnitude is not None:
        magnitudes = module.split(tensors.pop(module.name, MAGNITUDE), -1)
    if blocks and a.shape[-2] != sum(ranks):
        raise CheckpointError(f"{module.name} has rank {a.shape[-2]} in the file, {sum(ranks)} by its options")
    # part by part: rows of B always, columns of B and rows of A if they are blocks
    first = 0
    for layer, part, rank, magnitude in zip(layers, module.split(b, -2), ranks, magnitudes, strict=True):
        columns = slice(first, first + rank) if blocks else slice(None)
        first += rank
        if layer is None:
            continue
        fill(layer.lora_A, a[..., columns, :], f"{A} of {module.name}")
        fill(layer.lora_B, part[..., columns] * (present[0].scaling / layer.scaling), f"{B} of {module.name}")
        if magnitude is not None:
            fill(layer.magnitude, magnitude, f"{MAGNITUDE} of {module.name}")


def _options(config: dict[str, object], modules: list[HFModule], tensors: TensorReader) -> dict[str, object]:
    """The options under which our LoRA has just the layers of a file that PEFT wrote."""
    ours: dict[str, Size] = {}
    for module in tensors.of(modules, A):
        rank = tensors.peek(module.name, A).shape[0] // (module.n_experts or 1)
        size = size_in(config, tensors.names[Key(module.name, A)], rank)
        ours |= {site.names[0]: size for site in module.parts}
    saved_modules = [site.names[0] for module in tensors.of(modules, "weight") for site in module.parts]
    every = [site.names[0] for module in modules for site in module.parts]
    return options_of(config, ours, saved_modules, every)
