"""Between whole tensors and the pieces of them that processes hold."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor


def full_tensor(value: Tensor) -> Tensor:
    """A sharded tensor put together; every process of its mesh must ask for it. Any other as it is."""
    if not isinstance(value, DTensor):
        return value
    # weights that wait in RAM travel between devices
    return value.detach().to(value.device_mesh.device_type).full_tensor()


def full_tensor_on_cpu(value: object) -> object:
    """The same, on the CPU; what is not sharded as it is."""
    return full_tensor(value).cpu() if isinstance(value, DTensor) else value


def local_shard(value: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return value.to_local() if isinstance(value, DTensor) else value


def shard_like(full: Tensor, like: Tensor) -> Tensor:
    """What this process holds of a whole tensor that is to be cut as `like` is."""
    if not isinstance(like, DTensor) or isinstance(full, DTensor):  # it need not be, or is cut already
        return full
    mesh, part = like.device_mesh, full
    # tensor parallelism, the last dimension of the mesh, cuts first, and sharding cuts its pieces
    for axis in reversed(range(mesh.ndim)):
        placement = like.placements[axis]
        if not placement.is_replicate():
            part = _chunk(part, mesh.size(axis), mesh.get_local_rank(axis), placement.dim)
    part = part.to(like.device).contiguous()
    return DTensor.from_local(
        part, mesh, like.placements, run_check=False, shape=full.shape, stride=full.contiguous().stride()
    )


def move_unsharded(module: nn.Module, device: torch.device) -> None:
    """Move what is not in pieces, in place: pieces lie where they are stepped."""
    for tensor in [*module.parameters(), *module.buffers()]:
        if not isinstance(tensor, DTensor):
            tensor.data = tensor.data.to(device)


def map_across_ranks(function: Callable[[Tensor], Tensor], values: list[Tensor], mesh: DeviceMesh) -> list[Tensor]:
    """The function of each of several matrices in pieces, whole: each process of the mesh calls it for its share."""
    group, rank, size = _shard_group(mesh)
    results: list[Tensor] = []
    for first in range(0, len(values), size):
        some = [full_tensor(value) for value in values[first : first + size]]
        own = function(some[rank]).to(some[rank].dtype).contiguous() if rank < len(some) else None
        for owner, value in enumerate(some):
            result = own if owner == rank else torch.empty_like(value)
            if group is not None:
                dist.broadcast(result, group=group, group_src=owner)
            results.append(result)
    return results


def _shard_group(mesh: DeviceMesh) -> tuple[dist.ProcessGroup | None, int, int]:
    """The processes that hold pieces of the same matrix: their group, the place of this one, and how many they are."""
    if mesh.ndim == 1:
        return mesh.get_group(), mesh.get_local_rank(), mesh.size()
    if mesh.size() == dist.get_world_size():
        return dist.group.WORLD, dist.get_rank(), mesh.size()
    return None, 0, 1


def _chunk(tensor: Tensor, size: int, rank: int, dim: int) -> Tensor:
    parts = tensor.chunk(size, dim)
    return parts[rank] if rank < len(parts) else tensor.narrow(dim, 0, 0)
