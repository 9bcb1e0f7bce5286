"""Layers that an adapter trains whole, as PEFT writes its modules_to_save."""

import torch
from torch import Tensor, nn

from genai_pl.errors import ConfigError
from genai_pl.models.hf.families import Weight
from genai_pl.peft.adapter import AdapterLayer
from genai_pl.peft.adapter_layers import TrainedCopy
from genai_pl.peft.io.hf_names import Module
from genai_pl.peft.io.tensors import Tensors, fill

Layers = list[TrainedCopy | None]  # of the parts of a module


def kind_of(module: Module, layers: list[AdapterLayer | None]) -> type | None:
    """The class of the adapter's layers in a module of theirs, or None; ConfigError for two at once."""
    kinds = {type(layer) for layer in layers if layer is not None}
    if len(kinds) > 1:
        raise ConfigError(f"peft.modules_to_save: {module.name} is one layer in transformers: adapt or save all of it")
    return next(iter(kinds), None)


def write_whole(module: Module, layers: Layers) -> dict[str, Tensor]:
    """Weight and bias of a module of theirs; parts that are not trained keep what they have."""
    found = {}
    for row in module.rows:
        parts = [_parameter(holder, name).detach() for name, holder in _holders(module, layers, row)]
        found[_kind(row.hf_name)] = row.to_hf(torch.cat(parts))
    return found


def fill_whole(module: Module, layers: Layers, tensors: Tensors) -> None:
    """Put what `write_whole` wrote into the copies."""
    for row in module.rows:
        kind, ours = _kind(row.hf_name), _kind(row.names[0])
        parts = module.split(row.from_hf(tensors.take(module.name, kind)))
        for (_, holder), layer, part in zip(_holders(module, layers, row), layers, parts, strict=True):
            if layer is not None:
                _fill(holder, ours, part, tensors.filled, f"{kind} of {module.name}")


def _fill(holder: nn.Module, kind: str, part: Tensor, filled: dict[nn.Parameter, Tensor], what: str) -> None:
    """Fill a parameter of a copy; one that another copy shares, and has filled otherwise, comes apart."""
    parameter = _parameter(holder, kind)
    if not torch.equal(filled.setdefault(parameter, part), part):
        parameter = nn.Parameter(torch.empty_like(parameter))
        setattr(holder, kind, parameter)
    fill(parameter, part, what)


def _holders(module: Module, layers: Layers, row: Weight) -> list[tuple[str, nn.Module]]:
    """The names of the parameters, and the modules that hold what counts."""
    inner = [layer.copy if layer else site.inner for site, layer in zip(module.parts, layers, strict=True)]
    return list(zip(row.names, inner, strict=True))


def _parameter(holder: nn.Module, name: str) -> nn.Parameter:
    return dict(holder.named_parameters())[_kind(name)]


def _kind(name: str) -> str:
    return name.rpartition(".")[2]
