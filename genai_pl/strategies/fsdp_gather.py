"""Gathering an FSDP model: full weights on every rank for a while, or at the end on the first rank.

The first is for generating text during training, the second for the export.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from genai_pl.distributed.dtensor import full_tensor_on_cpu
from genai_pl.strategies.quantized_shards import full_codes_on_cpu, is_quantized_shard


def gather_parameters(model: nn.Module) -> None:
    """Give the first rank every parameter in full, in place and in RAM; a collective.

    For the end of a run: a sharded model cannot be trained any more afterwards. A model that is not sharded is left
        unchanged.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # the last forward pass may have left gathered weights, in its rounded dtype
    # replace each sharded parameter by a full one; a tied weight stays tied
    full_parameters: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if not isinstance(parameter, DTensor):
                continue
            if parameter not in full_parameters:
                gather = full_codes_on_cpu if is_quantized_shard(parameter) else full_tensor_on_cpu
                full = gather(parameter)
                full_parameters[parameter] = nn.Parameter(full, requires_grad=parameter.requires_grad)
            if dist.get_rank() == 0:
                setattr(module, name, full_parameters[parameter])


@contextmanager
def unsharded(model: nn.Module, *, reshard: bool) -> Iterator[None]:
    """A context in which every rank holds the full weights, so that forward passes communicate nothing.

    Each rank may then run as many forward passes as it likes: in a rollout ranks generate texts of different lengths.
    All ranks must enter it, between two steps.

    reshard: whether blocks free their gathered weights after a forward pass otherwise (`reshard_after_forward`)
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
        model.reset_iter_state()  # reshard, and forget that forward passes without a backward pass took place
