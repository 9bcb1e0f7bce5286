"""Layers that an adapter trains whole, as PEFT writes its modules_to_save."""

import torch
from torch import Tensor, nn

from genai_pl.errors import ConfigError
from genai_pl.models.hf.families import Weight
from genai_pl.peft.adapter import AdapterLayer
from genai_pl.peft.adapter_layers import TrainedCopy
from genai_pl.peft.io.hf_names import HFModule
from genai_pl.peft.io.tensors import TensorReader, fill

Layers = list[TrainedCopy | None]  # of the parts of a module


def layer_type(module: HFModule, layers: list[AdapterLayer | None]) -> type | None:
    """The class of the adapter's layers in a module of theirs, or None; ConfigError for two at once."""
    kinds = {type(layer) for layer in layers if layer is not None}
    if len(kinds) > 1:
        raise ConfigError(f"peft.modules_to_save: {module.name} is one layer in transformers: adapt or save all of it")
    return next(iter(kinds), None)


def saved_module_tensors(module: HFModule, layers: Layers) -> dict[str, Tensor]:
    """Weight and bias of a module of theirs; parts that are not trained keep what they have."""
    tensors = {}
    for weight in module.weights:
        parts = [_parameter(holder, name).detach() for name, holder in _holders(module, layers, weight)]
        tensors[_kind(weight.hf_name)] = weight.to_hf(torch.cat(parts))
    return tensors


def load_saved_modules(module: HFModule, layers: Layers, tensors: TensorReader) -> None:
    """Put what `saved_module_tensors` wrote into the copies."""
    for weight in module.weights:
        kind, ours = _kind(weight.hf_name), _kind(weight.names[0])
        parts = module.split(weight.from_hf(tensors.pop(module.name, kind)))
        for (_, holder), layer, part in zip(_holders(module, layers, weight), layers, parts, strict=True):
            if layer is not None:
                _fill(holder, ours, part, tensors.filled, f"{kind} of {module.name}")


def _fill(holder: nn.Module, kind: str, part: Tensor, filled: dict[nn.Parameter, Tensor], what: str) -> None:
    """Fill a parameter of a copy; one that another copy shares, and has filled otherwise, comes apart."""
    parameter = _parameter(holder, kind)
    if not torch.equal(filled.setdefault(parameter, part), part):
        parameter = nn.Parameter(torch.empty_like(parameter))
        setattr(holder, kind, parameter)
    fill(parameter, part, what)


def _holders(module: HFModule, layers: Layers, weight: Weight) -> list[tuple[str, nn.Module]]:
    """The names of the parameters, and the modules that hold what counts."""
    inner = [layer.copy if layer else site.inner for site, layer in zip(module.parts, layers, strict=True)]
    return list(zip(weight.names, inner, strict=True))


def _parameter(holder: nn.Module, name: str) -> nn.Parameter:
    return dict(holder.named_parameters())[_kind(name)]


def _kind(name: str) -> str:
    return name.rpartition(".")[2]
