"""A model in pieces on many processes: whole for a while on each, or at last on one."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from genai_pl.distributed.dtensor import full_tensor_on_cpu


def gather_parameters(model: nn.Module) -> None:
    """Give the first process every parameter whole, in place and on the CPU; all processes must call it.

    A model that is not sharded stays as it is. A sharded one cannot be trained on.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # weights of the last forward pass may lie around, rounded
    full_parameters: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if not isinstance(parameter, DTensor):
                continue
            if parameter not in full_parameters:  # a tied weight stays tied
                full = full_tensor_on_cpu(parameter)
                full_parameters[parameter] = nn.Parameter(full, requires_grad=parameter.requires_grad)
            if dist.get_rank() == 0:
                setattr(module, name, full_parameters[parameter])


@contextmanager
def unsharded(model: nn.Module, *, reshard: bool) -> Iterator[None]:
    """The weights whole on every process inside, so that forward passes send nothing: each may run as many as it likes.

    All processes must enter it, between two steps. `reshard` says whether a block lets go of its weights otherwise.
    """
    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        if part is not model:
            part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            if part is not model:
                part.set_reshard_after_forward(reshard, recurse=False)
        model.reset_iter_state()  # back to pieces; and what backward passes expect forgets these forward passes
