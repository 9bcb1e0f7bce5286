"""Between whole tensors and the pieces of them that processes hold."""

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def whole(value: object) -> object:
    """A sharded tensor put together, on the CPU; every process of its mesh must ask for it. Anything else as it is."""
    if not isinstance(value, DTensor):
        return value
    # weights that wait in RAM travel between devices
    return value.detach().to(value.device_mesh.device_type).full_tensor().cpu()


def piece(full: Tensor, like: Tensor) -> Tensor:
    """What this process holds of a whole tensor that is to be cut as `like` is."""
    if not isinstance(like, DTensor) or isinstance(full, DTensor):  # it need not be, or is cut already
        return full
    mesh, local = like.device_mesh, full
    # tensor parallelism, the last dimension of the mesh, cuts first, and sharding cuts its pieces
    for axis in reversed(range(mesh.ndim)):
        placement = like.placements[axis]
        if not placement.is_replicate():
            local = _chunk(local, mesh.size(axis), mesh.get_local_rank(axis), placement.dim)
    local = local.to(like.device).contiguous()
    return DTensor.from_local(
        local, mesh, like.placements, run_check=False, shape=full.shape, stride=full.contiguous().stride()
    )


def _chunk(tensor: Tensor, size: int, rank: int, dim: int) -> Tensor:
    parts = tensor.chunk(size, dim)
    return parts[rank] if rank < len(parts) else tensor.narrow(dim, 0, 0)


def gather(model: nn.Module) -> None:
    """Give the first process every parameter whole, in place and on the CPU; all processes must call it.

    A model that is not sharded stays as it is. A sharded one cannot be trained on.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # weights of the last forward pass may lie around, rounded
    found: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if not isinstance(parameter, DTensor):
                continue
            if parameter not in found:  # a tied weight stays tied
                full = whole(parameter)
                found[parameter] = nn.Parameter(full, requires_grad=parameter.requires_grad)
            if dist.get_rank() == 0:
                setattr(module, name, found[parameter])
