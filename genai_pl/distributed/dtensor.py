"""DTensor helpers: full tensors from shards, shards from full tensors, work divided among the ranks of a mesh.

FSDP2 and tensor parallelism store parameters as DTensors: a rank holds its shard, and mesh and placements say which
part of the full
tensor that is. A gather is a collective: every rank of the mesh must call it, in the same order, or the run hangs.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_dtensor(value: object) -> "TypeGuard[DTensor]":
    """Whether a value is a DTensor; plain tensors and parameters are told apart without the import of DTensor.

    That import takes a third of a second, which only runs on several devices need to spend.
    """
    if not isinstance(value, Tensor) or type(value) in (Tensor, nn.Parameter):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(value, DTensor)


def full_tensor(value: Tensor) -> Tensor:
    """The full tensor of a DTensor, detached, on the device of its mesh (a collective); any other unchanged."""
    if not is_dtensor(value):
        return value
    # shards that are kept in RAM are gathered through the devices of the mesh
    return value.detach().to(value.device_mesh.device_type).full_tensor()


def full_tensor_on_cpu(value: object) -> object:
    """The full tensor of a DTensor, in RAM (a collective); any other value unchanged."""
    return full_tensor(value).cpu() if is_dtensor(value) else value


def local_shard(value: Tensor) -> Tensor:
    """This rank's shard of a DTensor, a view that writes through to it; any other tensor unchanged."""
    return value.to_local() if is_dtensor(value) else value


def shard_like(full: Tensor, like: Tensor) -> Tensor:
    """This rank's shard of a full tensor, as a DTensor with the mesh and placements of `like`; sends nothing.

    Every rank must hold the same `full`, which is returned unchanged where it is a DTensor, or `like` is none.
    """
    if not is_dtensor(like) or is_dtensor(full):  # it need not be, or is cut already
        return full
    mesh, part = like.device_mesh, full
    # tensor parallelism, the last dimension of the mesh, shards first, and FSDP shards its shards
    for axis in reversed(range(mesh.ndim)):
        placement = like.placements[axis]
        if not placement.is_replicate():
            part = _chunk(part, mesh.size(axis), mesh.get_local_rank(axis), placement.dim)
    part = part.to(like.device).contiguous()
    from torch.distributed.tensor import DTensor

    # run_check would send tensors to compare them; the stride is that of the full tensor, contiguous
    return DTensor.from_local(
        part, mesh, like.placements, run_check=False, shape=full.shape, stride=full.contiguous().stride()
    )


def with_shard(part: Tensor, like: Tensor) -> Tensor:
    """The DTensor that has `part` where `like` has this rank's shard; `part` itself where `like` is no DTensor.

    The last dimension may differ from that of `like`, where no process divides it. Sends nothing.
    """
    if not is_dtensor(like):
        return part
    from torch.distributed.tensor import DTensor

    shape = (*like.shape[:-1], part.size(-1)) if part.ndim == like.ndim and not divides_rows(like) else like.shape
    stride = torch.empty(shape, device="meta").stride()
    value = DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=torch.Size(shape), stride=stride
    )
    return value.to(like.device)  # offloaded shards stay in RAM, where from_local moves them to the mesh's device


def divides_rows(value: "DTensor") -> bool:
    """Whether processes divide the last dimension of a DTensor."""
    return any(getattr(placement, "dim", None) == value.ndim - 1 for placement in value.placements)


def move_unsharded(module: nn.Module, device: torch.device) -> None:
    """Move parameters and buffers that are no DTensors to a device, in place.

    With CPU offload shards stay in RAM, where they are stepped; every forward pass needs the rest on the GPU.
    """
    for tensor in [*module.parameters(), *module.buffers()]:
        if not is_dtensor(tensor):
            tensor.data = tensor.data.to(device)


def map_across_ranks(function: Callable[[Tensor], Tensor], values: list[Tensor], mesh: DeviceMesh) -> list[Tensor]:
    """`function` of each full matrix, in the order of `values`; the calls are divided among the ranks of the mesh.

    Of each `size` matrices rank i computes the i-th and broadcasts it: 1 / size of the time, with `size` full matrices
    in memory.
    """
    group, rank, size = _shard_group(mesh)
    results: list[Tensor] = []
    for first in range(0, len(values), size):
        some = [full_tensor(value) for value in values[first : first + size]]
        # this rank computes the result of one, in the dtype that the receive buffers have
        own = function(some[rank]).to(some[rank].dtype).contiguous() if rank < len(some) else None
        for owner, value in enumerate(some):
            result = own if owner == rank else torch.empty_like(value)
            if group is not None:
                dist.broadcast(result, group=group, group_src=owner)
            results.append(result)
    return results


def _shard_group(mesh: DeviceMesh) -> tuple[dist.ProcessGroup | None, int, int]:
    """The ranks that hold shards of the same matrix: process group (None: there is none), own rank in it, size."""
    if mesh.ndim == 1:
        return mesh.get_group(), mesh.get_local_rank(), mesh.size()
    if mesh.size() == dist.get_world_size():
        return dist.group.WORLD, dist.get_rank(), mesh.size()
    return None, 0, 1


def _chunk(tensor: Tensor, size: int, rank: int, dim: int) -> Tensor:
    """Chunk `rank` of `size` along a dimension, as torch shards: the last ranks' chunks may be shorter, or empty."""
    parts = tensor.chunk(size, dim)
    return parts[rank] if rank < len(parts) else tensor.narrow(dim, 0, 0)
