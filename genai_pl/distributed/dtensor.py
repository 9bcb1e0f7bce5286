"""DTensor helpers: full tensors from shards, shards from full tensors, and work divided among the ranks of a mesh.

FSDP2 and tensor parallelism store parameters as `DTensor`s: a rank holds its shard, and the mesh with the placements
says which part of the full tensor that is. Code outside the strategies (optimizers, checkpoints, fingerprints of
models) calls these functions and works on plain tensors and DTensors alike.

A gather is a collective: every rank of the mesh must call it, in the same order, or the run hangs. `local_shard` and
`shard_like` send nothing.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor


def full_tensor(value: Tensor) -> Tensor:
    """The full tensor of a DTensor, on the device of its mesh; any other tensor unchanged.

    A collective over the mesh. The result is detached from autograd.
    """
    if not isinstance(value, DTensor):
        return value
    # weights that wait in RAM travel between devices
    return value.detach().to(value.device_mesh.device_type).full_tensor()


def full_tensor_on_cpu(value: object) -> object:
    """The full tensor of a DTensor, in RAM; any other value (tensor, number, None) unchanged.

    Checkpoints use it for optimizer states, whose values are tensors and plain numbers.
    """
    return full_tensor(value).cpu() if isinstance(value, DTensor) else value


def local_shard(value: Tensor) -> Tensor:
    """This rank's shard of a DTensor, a view that writes through to it; any other tensor unchanged."""
    return value.to_local() if isinstance(value, DTensor) else value


def shard_like(full: Tensor, like: Tensor) -> Tensor:
    """This rank's shard of a full tensor, as a DTensor with the mesh and placements of `like`; sends nothing.

    Every rank must hold the same `full`, which may have another dtype than `like`. `full` is returned unchanged where
    `like` is a plain tensor, or where `full` is a DTensor already.
    """
    if not isinstance(like, DTensor) or isinstance(full, DTensor):  # it need not be, or is cut already
        return full
    mesh, part = like.device_mesh, full
    # tensor parallelism, the last dimension of the mesh, shards first, and FSDP shards its shards
    for axis in reversed(range(mesh.ndim)):
        placement = like.placements[axis]
        if not placement.is_replicate():
            part = _chunk(part, mesh.size(axis), mesh.get_local_rank(axis), placement.dim)
    part = part.to(like.device).contiguous()
    # run_check would send tensors to compare them; the stride is that of the full tensor, contiguous
    return DTensor.from_local(
        part, mesh, like.placements, run_check=False, shape=full.shape, stride=full.contiguous().stride()
    )


def move_unsharded(module: nn.Module, device: torch.device) -> None:
    """Move parameters and buffers that are no DTensors to a device, in place.

    With CPU offload the shards stay in RAM, where the optimizer steps them, while buffers and replicated weights are
    needed on the GPU by every forward pass.
    """
    for tensor in [*module.parameters(), *module.buffers()]:
        if not isinstance(tensor, DTensor):
            tensor.data = tensor.data.to(device)


def map_across_ranks(function: Callable[[Tensor], Tensor], values: list[Tensor], mesh: DeviceMesh) -> list[Tensor]:
    """`function` of each full matrix, in the order of `values`; the calls are divided among the ranks of the mesh.

    Each group of `size` matrices is gathered on all ranks, rank i computes the result of matrix i, and broadcasts it:
    as many results as one rank would compute alone, in 1 / size of the time, with `size` full matrices in memory. Muon
    orthogonalizes its updates so. A collective over the mesh; a mesh that is not the whole world and has several
    dimensions has no one group to broadcast in, and there each rank computes every result itself.
    """
    group, rank, size = _shard_group(mesh)
    results: list[Tensor] = []
    for first in range(0, len(values), size):
        # gather as many full matrices as there are ranks
        some = [full_tensor(value) for value in values[first : first + size]]
        # this rank computes the result of one, in the dtype that the receive buffers have
        own = function(some[rank]).to(some[rank].dtype).contiguous() if rank < len(some) else None
        # and sends its result to all others
        for owner, value in enumerate(some):
            result = own if owner == rank else torch.empty_like(value)
            if group is not None:
                dist.broadcast(result, group=group, group_src=owner)
            results.append(result)
    return results


def _shard_group(mesh: DeviceMesh) -> tuple[dist.ProcessGroup | None, int, int]:
    """The ranks that hold shards of the same matrix: their process group (None: no such group), this rank in it, their
    number.
    """
    if mesh.ndim == 1:
        return mesh.get_group(), mesh.get_local_rank(), mesh.size()
    if mesh.size() == dist.get_world_size():
        return dist.group.WORLD, dist.get_rank(), mesh.size()
    return None, 0, 1


def _chunk(tensor: Tensor, size: int, rank: int, dim: int) -> Tensor:
    """Chunk `rank` of `size` along a dimension, as torch shards: the last ranks' chunks may be shorter, or empty."""
    parts = tensor.chunk(size, dim)
    return parts[rank] if rank < len(parts) else tensor.narrow(dim, 0, 0)
