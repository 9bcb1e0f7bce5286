"""Tensor-parallel collectives and their gradients (Shoeybi et al. 2019, section 3; Korthikanti et al. 2022, 4.2.2).

    method                      forward          backward         paper
    copy_to_region              identity         all-reduce       f
    reduce_from_region          all-reduce       identity         g
    gather_from_sequence        all-gather       reduce-scatter   g
    reduce_scatter_to_sequence  reduce-scatter   all-gather       g-bar
    scatter_to_sequence         own shard        all-gather
    gather_without_grad_sum     all-gather       own shard

The first two pairs enter and leave a divided layer, on full sequences or on shards of them. The last pair encloses the
whole stack under sequence parallelism, where every rank does the same work on the full sequence: summing the gradient
there would count it `size` times. The names are Megatron-LM's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from genai_pl.distributed.dtensor import local_shard

Exchange = Callable[[Tensor], Tensor]
COLLECTIVES = torch.ops._c10d_functional  # those that torch.compile can follow


@dataclass(frozen=True)
class TensorParallelGroup:
    """The ranks that divide each layer among them, as a constant that autograd functions can hold.

    group: name of the process group, which functional collectives take instead of the group object
    size: number of ranks
    rank: number of this rank in the group

    Sequences are (B, T, C), sharded along T: t = ceil(T / size) tokens a rank, zeros after the last where size does
    not divide T.
    """

    group: str  # its name
    size: int
    rank: int

    @classmethod
    def of(cls, group: dist.ProcessGroup) -> "TensorParallelGroup":
        """The constant for a process group of which this rank is a member."""
        return cls(group.group_name, group.size(), group.rank())

    def copy_to_region(self, x: Tensor) -> Tensor:
        """x (B, T, C), which every rank feeds to its part of a layer."""
        return Collective.apply(x, identity, self._all_reduce)

    def reduce_from_region(self, x: Tensor) -> Tensor:
        """The sum over ranks of their partial outputs."""
        return Collective.apply(x, self._all_reduce, identity)

    def gather_from_sequence(self, shard: Tensor, length: int) -> Tensor:
        """The full sequence (B, length, C) of shards (B, t, C), for a divided layer."""
        return Collective.apply(shard, partial(self._all_gather, length), self._reduce_scatter)

    def reduce_scatter_to_sequence(self, x: Tensor) -> Tensor:
        """This rank's shard (B, t, C) of the sum over ranks of partial outputs (B, T, C)."""
        return Collective.apply(x, self._reduce_scatter, partial(self._all_gather, x.shape[1]))

    def scatter_to_sequence(self, x: Tensor) -> Tensor:
        """This rank's shard (B, t, C) of x (B, T, C), which every rank holds."""
        return Collective.apply(x, self._own_shard, partial(self._all_gather, x.shape[1]))

    def gather_without_grad_sum(self, shard: Tensor, length: int) -> Tensor:
        """The full sequence (B, length, C) of shards (B, t, C), with which all ranks do the same."""
        return Collective.apply(shard, partial(self._all_gather, length), self._own_shard)

    def _all_reduce(self, x: Tensor) -> Tensor:
        return COLLECTIVES.wait_tensor(COLLECTIVES.all_reduce(x.contiguous(), "sum", self.group))

    def _all_gather(self, length: int, shard: Tensor) -> Tensor:
        """The full sequence (B, length, C), the padding of the last shard dropped."""
        B, t, C = shard.shape
        shards = COLLECTIVES.all_gather_into_tensor(shard.contiguous(), self.size, self.group)  # (processes * B, t, C)
        shards = COLLECTIVES.wait_tensor(shards).view(self.size, B, t, C)
        return shards.transpose(0, 1).reshape(B, self.size * t, C)[:, :length]

    def _reduce_scatter(self, x: Tensor) -> Tensor:
        """This rank's shard of the sum over ranks."""
        shards = self._shards(x).flatten(0, 1).contiguous()  # (processes * B, t, C)
        return COLLECTIVES.wait_tensor(COLLECTIVES.reduce_scatter_tensor(shards, "sum", self.size, self.group))

    def _own_shard(self, x: Tensor) -> Tensor:
        """This rank's shard; a copy, as collectives take no strided views."""
        return self._shards(x)[self.rank].clone(memory_format=torch.contiguous_format)

    def _shards(self, x: Tensor) -> Tensor:
        """All shards of full sequences (B, T, C), padded with zeros: (size, B, t, C)."""
        B, T, C = x.shape
        t = -(-T // self.size)
        return F.pad(x, (0, 0, 0, t * self.size - T)).view(B, self.size, t, C).transpose(0, 1)


class Collective(torch.autograd.Function):
    """An autograd function of two collectives: one for the value, another for the gradient."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, collective: Exchange, grad_collective: Exchange) -> Tensor:
        ctx.grad_collective = grad_collective
        return collective(x)

    @staticmethod
    def backward(ctx: FunctionCtx, d: Tensor) -> tuple[Tensor, None, None]:
        return ctx.grad_collective(d), None, None


def exchange_rows(x: Tensor, *, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    """Rows (sum of `received`, C) from all ranks of a group, in the order of ranks, for rows (sum of `sent`, C) to them.

    sent, received: numbers of rows, by rank. Gradients go the other way.
    """
    there = partial(_all_to_all, sent, received, group.group_name)
    back = partial(_all_to_all, received, sent, group.group_name)
    return Collective.apply(x, there, back)


def _all_to_all(sent: list[int], received: list[int], group: str, x: Tensor) -> Tensor:
    return COLLECTIVES.wait_tensor(COLLECTIVES.all_to_all_single(x.contiguous(), received, sent, group))


def identity(x: Tensor) -> Tensor:
    return x.view_as(x)


def sum_gradients(parameters: list[Tensor], group: dist.ProcessGroup) -> None:
    """Sum gradients over the ranks of a group, in place, in one all-reduce.

    For parameters that every rank holds in full but whose heads or tokens it sees in part; once a step, before
    clipping.
    """
    gradients = [local_shard(parameter.grad) for parameter in parameters if parameter.grad is not None]
    if gradients:
        # one flat buffer: many small all-reduces would be bound by latency
        total = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(total, group=group)
        for gradient, summed in zip(gradients, total.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(summed.view_as(gradient))


def average(gradient: Tensor, group: dist.ProcessGroup) -> None:
    """Replace a gradient by its mean over the ranks of a group, in place: DDP's reduction for parameters that FSDP
    ignores.
    """
    dist.all_reduce(gradient, group=group)
    gradient /= group.size()
