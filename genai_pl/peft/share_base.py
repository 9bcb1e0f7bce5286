"""One base in memory under several models: what belongs to no adapter, and models that share it."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from genai_pl.peft.targets import module_sites


def base_tensors(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """Parameters and buffers that belong to no adapter: name without adapters, module, attribute, tensor."""
    places = [("", model), *((f"{site.names[0]}.", site.inner) for site in module_sites(model))]
    for prefix, module in places:
        if module is not None:
            for attribute, tensor in {**module._parameters, **module._buffers}.items():
                if tensor is not None:
                    yield prefix + attribute, module, attribute, tensor


@torch.no_grad()
def share_frozen(model: nn.Module, other: nn.Module) -> int:
    """Let parameters of the first model be frozen ones of the other's base where name and values agree; bytes that are shared.

    The first model is frozen whole: training it would change the other.
    """
    model.requires_grad_(False)
    theirs = {name: x for name, _, _, x in base_tensors(other) if isinstance(x, nn.Parameter) and not x.requires_grad}
    shared = 0
    for name, module, attribute, tensor in list(base_tensors(model)):
        same = theirs.get(name)
        if same is not None and same.dtype == tensor.dtype and torch.equal(same, tensor):
            setattr(module, attribute, same)
            shared += same.nbytes
    return shared
