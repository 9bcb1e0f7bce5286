"""Native adapter files: PEFT's two files with our parameter names, for methods that PEFT does not have."""

from collections.abc import Callable

from torch import Tensor, nn

from genai_pl.errors import CheckpointError
from genai_pl.peft.adapter import Adapter, AdapterLayer
from genai_pl.peft.io.hf_names import PREFIX
from genai_pl.peft.io.tensors import AdapterFile, common_config, fill, layer_of, make
from genai_pl.peft.targets import module_sites


def write_own(model: nn.Module, adapter: Adapter) -> AdapterFile:
    """Every parameter of the adapter's layers, under the name of its site."""
    tensors = dict(_parameters(model, adapter))
    return AdapterFile(common_config(model, adapter.method.upper()), tensors, adapter.options)


def read_own(model: nn.Module, file: AdapterFile, method: Callable[..., nn.Module]) -> nn.Module:
    """The model with the adapter, made by `method` with the options in the file; its tensors must match exactly."""
    if file.options is None:
        raise CheckpointError("the options of its adapter are missing: not written by genai_pl")
    adapter = make(model, method, file.options)
    parameters = dict(_parameters(model, adapter))
    for name in (*parameters, *file.tensors):
        if name not in file.tensors:
            raise CheckpointError(f"tensor {name} is missing")
        if name not in parameters:
            raise CheckpointError(f"tensor {name} fits no layer of this model")
        fill(parameters[name], file.tensors[name], name)
    return model


def _parameters(model: nn.Module, adapter: Adapter) -> list[tuple[str, Tensor]]:
    """(name in the file, value) of the adapter's parameters."""
    layers = [(site.names[0], layer_of(site, adapter)) for site in module_sites(model)]
    return [
        (f"{PREFIX}{place}.{name}", value.detach())
        for place, layer in layers
        if layer is not None
        for name, value in _of(layer)
    ]


def _of(layer: AdapterLayer) -> list[tuple[str, nn.Parameter]]:
    """The parameters of a layer itself, without those of its base."""
    return [(name, value) for name, value in layer.named_parameters() if not name.startswith("base.")]
