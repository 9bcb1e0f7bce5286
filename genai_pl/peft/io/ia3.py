"""IA3 files. PEFT stores a scale as (1, in) on the input and as (out, 1) on the output of a layer."""

import torch
from torch import Tensor, nn

from genai_pl.errors import CheckpointError, ConfigError
from genai_pl.peft.adapter import Adapter
from genai_pl.peft.adapter_layers import TrainedCopy
from genai_pl.peft.ia3 import IA3Linear, ia3, ones_like_output
from genai_pl.peft.io.hf_names import PREFIX, HFModule, hf_modules, shortest_suffixes
from genai_pl.peft.io.modules_to_save import (
    layer_type,
    load_saved_modules,
    saved_module_names,
    saved_module_tensors,
)
from genai_pl.peft.io.tensors import AdapterFile, TensorReader, check_neutral, common_config, fill, layer_of, make

SCALE = "ia3_l"
KINDS = (SCALE, "weight", "bias")
UNDERSTOOD = ("feedforward_modules", "init_ia3_weights")


def write_ia3(model: nn.Module, adapter: Adapter) -> AdapterFile:
    """The adapter in PEFT's layout; parts of a joined module without a scale get ones."""
    tensors: dict[str, Tensor] = {}
    on_input: list[str] = []
    modules = hf_modules(model)
    # modules with layers of this adapter, the fully trained ones apart
    adapted = [(module, [layer_of(site, adapter) for site in module.parts]) for module in modules]
    adapted = [(module, layers) for module, layers in adapted if any(layer is not None for layer in layers)]
    saved_modules = [(module, layers) for module, layers in adapted if layer_type(module, layers) is TrainedCopy]
    for module, layers in saved_modules:
        tensors |= {
            f"{PREFIX}{module.name}.{kind}": value for kind, value in saved_module_tensors(module, layers).items()
        }
    adapted = [(module, layers) for module, layers in adapted if (module, layers) not in saved_modules]
    for module, layers in adapted:
        tensors[f"{PREFIX}{module.name}.{SCALE}"] = _join_scales(module, layers)
        on_input += [module.name] if any(layer is not None and layer.on_input for layer in layers) else []
    # suffixes that select just these modules, those scaled on the input first
    names = [module.name for module, _ in adapted]
    outputs = [name for name in names if name not in on_input]
    other_modules = [module.name for module in modules if module.name not in names]
    inner = shortest_suffixes(on_input, [*outputs, *other_modules])
    config = common_config(model, "IA3") | {
        "target_modules": inner + shortest_suffixes(outputs, [*on_input, *other_modules]),
        "feedforward_modules": inner,
        "fan_in_fan_out": any(module.transposed for module, _ in adapted),
        "init_ia3_weights": True,
        "modules_to_save": saved_module_names(module for module, _ in saved_modules),
    }
    return AdapterFile(config, tensors, adapter.options)


def read_ia3(model: nn.Module, file: AdapterFile) -> nn.Module:
    """The model with the adapter of a file that genai_pl or PEFT wrote."""
    # options from the metadata, or inferred from the shapes of PEFT's tensors
    check_neutral(file.config, UNDERSTOOD)
    modules = hf_modules(model)
    tensors = TensorReader(file, modules, KINDS)
    options = _options(modules, tensors) if file.options is None else file.options
    adapter = make(model, ia3, options)
    # the sites have changed: their modules are wrapped now
    for module in hf_modules(model):
        layers = [layer_of(site, adapter) for site in module.parts]
        if any(isinstance(layer, TrainedCopy) for layer in layers):
            load_saved_modules(module, layers, tensors)
        elif any(layer is not None for layer in layers):
            scale = tensors.pop(module.name, SCALE).flatten()
            parts = [scale] if any(layer is not None and layer.on_input for layer in layers) else module.split(scale)
            for layer, part in zip(layers, parts, strict=True):
                if layer is not None:
                    fill(layer.scale, part, f"{SCALE} of {module.name}")
    tensors.finish()
    return model


@torch.no_grad()
def _join_scales(module: HFModule, layers: list[IA3Linear | None]) -> Tensor:
    """The scale of one module of transformers: (1, in) on the input, (out, 1) on the output."""
    if any(layer is not None and layer.on_input for layer in layers):
        if len(layers) > 1:
            raise ConfigError(f"peft.feedforward_modules: {module.name} is one layer in transformers: scale its output")
        return layers[0].scale[None]
    places = zip(module.parts, layers, strict=True)
    scales = [ones_like_output(site.inner) if layer is None else layer.scale for site, layer in places]
    return torch.cat(scales)[:, None]


def _options(modules: list[HFModule], tensors: TensorReader) -> dict[str, object]:
    """The options under which our IA3 has just the layers of a file that PEFT wrote."""
    here = tensors.of(modules, SCALE)
    if not here:
        raise CheckpointError("no layer of IA3 in it")
    ours = [site.names[0] for module in here for site in module.parts]
    # the shape shows the side: (1, in) on the input, (out, 1) on the output
    inputs = [module for module in here if tensors.peek(module.name, SCALE).shape[0] == 1]
    if any(len(module.parts) > 1 for module in inputs):
        raise CheckpointError("it scales the input of a joined layer, which is not supported")
    inner = [module.parts[0].names[0] for module in inputs]
    every = [site.names[0] for module in modules for site in module.parts]
    saved_modules = [site.names[0] for module in tensors.of(modules, "weight") for site in module.parts]
    return {
        "modules_to_save": shortest_suffixes(saved_modules, [name for name in every if name not in saved_modules])
        or None,
        "target_modules": shortest_suffixes(ours, [name for name in every if name not in ours]),
        "feedforward_modules": shortest_suffixes(inner, [name for name in every if name not in inner]),
    }
