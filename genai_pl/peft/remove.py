"""Removal of an adapter: its layers leave the model, and those of other adapters around the same modules stay."""

from torch import nn

from genai_pl.peft.adapter import Adapter
from genai_pl.peft.targets import adapter_layers, base_module, module_sites


def remove_adapter(model: nn.Module, adapter: Adapter) -> nn.Module:
    """The model without the layers and virtual tokens of an adapter, changed in place.

    Parameters of the base stay as they are: frozen, and quantized if the adapter's method has quantized them.
    """
    for site in module_sites(model):
        layers = adapter_layers(site.module)
        if not any(layer.adapter is adapter for layer in layers):
            continue
        if site.inner is None:  # virtual tokens, which wrap no module
            for parent, attribute in site.holders:
                setattr(parent, attribute, None)
            continue
        module = base_module(site.module)
        for layer in reversed(layers):  # from the innermost out
            if layer.adapter is not adapter:
                layer.base = module
                module = layer
        site.replace(module)
    return model
