"""Shared bases: several models, such as policy and critic, that hold one copy of the same frozen weights."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from genai_pl.models.frozen import hold_frozen_in_16_bits, is_held_in_16_bits
from genai_pl.peft.adapter import adapters_of
from genai_pl.peft.targets import module_sites


def base_tensors(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """Yields (name without adapters, module, attribute, tensor) for parameters and buffers that belong to no adapter."""
    places = [("", model), *((f"{site.names[0]}.", site.inner) for site in module_sites(model))]
    for prefix, module in places:
        if module is not None:
            for attribute, tensor in {**module._parameters, **module._buffers}.items():
                if tensor is not None:
                    yield prefix + attribute, module, attribute, tensor


def hold_base_in_16_bits(model: nn.Module) -> int:
    """`hold_frozen_in_16_bits`, where DoRA, which takes norms of the exact weights, lets no bit be lost; bytes saved."""
    return hold_frozen_in_16_bits(model, rounds=all(adapter.method != "dora" for adapter in adapters_of(model)))


@torch.no_grad()
def share_frozen(model: nn.Module, other: nn.Module) -> int:
    """Replace parameters of `model` by equal frozen ones of `other`; returns the number of bytes shared.

    `model` is frozen whole, since training it would change `other`. Names, dtypes and values must be equal. Where `other`
    holds its frozen weights in 16 bits, so does `model` from now on; under DoRA, which takes norms, only where it is exact.
    """
    model.requires_grad_(False)
    if is_held_in_16_bits(other):
        hold_base_in_16_bits(model)
    theirs = {name: x for name, _, _, x in base_tensors(other) if isinstance(x, nn.Parameter) and not x.requires_grad}
    shared = 0
    for name, module, attribute, tensor in list(base_tensors(model)):
        same = theirs.get(name)
        if same is not None and same.dtype == tensor.dtype and torch.equal(same, tensor):
            setattr(module, attribute, same)
            shared += same.nbytes
    return shared
