"""Fully trained layers (`TrainedCopy`) in adapter files: PEFT's modules_to_save."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from genai_pl.errors import ConfigError
from genai_pl.models.hf.families import Weight
from genai_pl.peft.adapter import AdapterLayer
from genai_pl.peft.adapter_layers import TrainedCopy
from genai_pl.peft.io.hf_names import HFModule
from genai_pl.peft.io.tensors import TensorReader, fill
from genai_pl.peft.targets import SCORE_LAYERS

Layers = list[TrainedCopy | None]  # of one module, by part; None where a part is not wrapped


def layer_type(module: HFModule, layers: list[AdapterLayer | None]) -> type | None:
    """The class of an adapter's layers in one module of transformers, None without any; ConfigError for two classes."""
    kinds = {type(layer) for layer in layers if layer is not None}
    if len(kinds) > 1:
        raise ConfigError(f"peft.modules_to_save: {module.name} is one layer in transformers: adapt or save all of it")
    return next(iter(kinds), None)


def saved_module_names(modules: Iterable[HFModule]) -> list[str] | None:
    """The names for PEFT's option modules_to_save, None without modules; RoBERTa's classifier is one module of two layers."""
    names = ("classifier" if module.name.startswith("classifier.") else module.name for module in modules)
    return list(dict.fromkeys(names)) or None


def saved_module_tensors(module: HFModule, layers: Layers) -> dict[str, Tensor]:
    """Weight and bias of one module of transformers; parts that are not trained contribute their frozen values."""
    tensors = {}
    for weight in module.weights:
        parts = [_parameter(holder, name).detach() for name, holder in _holders(module, layers, weight)]
        tensors[_kind(weight.hf_name)] = weight.to_hf(torch.cat(parts))
    return tensors


def load_saved_modules(module: HFModule, layers: Layers, tensors: TensorReader) -> None:
    """Copy the tensors that `saved_module_tensors` made into the copies of a module's parts.

    BERT's pooler may be absent: PEFT leaves it frozen, and the copy is then that of the base.
    """
    if module.parts[0].leaf == SCORE_LAYERS[1] and not tensors.of([module], "weight"):
        return
    for weight in module.weights:
        kind, ours = _kind(weight.hf_name), _kind(weight.names[0])
        parts = module.split(weight.from_hf(tensors.pop(module.name, kind)))
        for (_, holder), layer, part in zip(_holders(module, layers, weight), layers, parts, strict=True):
            if layer is not None:
                _fill(holder, ours, part, tensors.filled, f"{kind} of {module.name}")


def _fill(holder: nn.Module, kind: str, part: Tensor, filled: dict[nn.Parameter, Tensor], what: str) -> None:
    """Fill a parameter of a copy; one shared with another copy is replaced first if its two values in the file differ."""
    parameter = _parameter(holder, kind)
    if not torch.equal(filled.setdefault(parameter, part), part):
        parameter = nn.Parameter(torch.empty_like(parameter))
        setattr(holder, kind, parameter)
    fill(parameter, part, what)


def _holders(module: HFModule, layers: Layers, weight: Weight) -> list[tuple[str, nn.Module]]:
    """(parameter name, module that holds the value in effect) for each part of a row of the table."""
    inner = [layer.copy if layer else site.inner for site, layer in zip(module.parts, layers, strict=True)]
    return list(zip(weight.names, inner, strict=True))


def _parameter(holder: nn.Module, name: str) -> nn.Parameter:
    """The parameter that the last component of `name` names."""
    return dict(holder.named_parameters())[_kind(name)]


def _kind(name: str) -> str:
    return name.rpartition(".")[2]
