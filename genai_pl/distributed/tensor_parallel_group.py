"""What processes that divide a layer tell each other, and what they tell each other of its gradients."""

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
    """The processes of a tensor-parallel group, in pairs of what follows each other in a layer.

    copied and summed are f and g of Shoeybi et al. 2019, 3; gathered and scattered are g and g-bar of Korthikanti et al.
    2022, 4.2.2, on shards of sequences (B, T, C) along T, the last of which end in zeros where T does not divide.
    """

    group: str  # its name
    size: int
    rank: int

    @classmethod
    def of(cls, group: dist.ProcessGroup) -> "TensorParallelGroup":
        """Those of a group that this process is in."""
        return cls(group.group_name, group.size(), group.rank())

    def copy_to_region(self, x: Tensor) -> Tensor:
        """What all have, of which each uses a part: its gradient is the sum of theirs."""
        return _Collective.apply(x, _identity, self._all_reduce)

    def reduce_from_region(self, x: Tensor) -> Tensor:
        """The sum of what each has, with which all do the same."""
        return _Collective.apply(x, self._all_reduce, _identity)

    def gather_from_sequence(self, shard: Tensor, length: int) -> Tensor:
        """The sequences of that length, of whose channels each uses a part."""
        return _Collective.apply(shard, partial(self._all_gather, length), self._reduce_scatter)

    def reduce_scatter_to_sequence(self, x: Tensor) -> Tensor:
        """This process's piece of the sum of what each has."""
        return _Collective.apply(x, self._reduce_scatter, partial(self._all_gather, x.shape[1]))

    def scatter_to_sequence(self, x: Tensor) -> Tensor:
        """This process's piece of what all have."""
        return _Collective.apply(x, self._own_shard, partial(self._all_gather, x.shape[1]))

    def gather_without_grad_sum(self, shard: Tensor, length: int) -> Tensor:
        """The sequences of that length, with which all do the same."""
        return _Collective.apply(shard, partial(self._all_gather, length), self._own_shard)

    def _all_reduce(self, x: Tensor) -> Tensor:
        return COLLECTIVES.wait_tensor(COLLECTIVES.all_reduce(x.contiguous(), "sum", self.group))

    def _all_gather(self, length: int, shard: Tensor) -> Tensor:
        B, t, C = shard.shape
        shards = COLLECTIVES.all_gather_into_tensor(shard.contiguous(), self.size, self.group)  # (processes * B, t, C)
        shards = COLLECTIVES.wait_tensor(shards).view(self.size, B, t, C)
        return shards.transpose(0, 1).reshape(B, self.size * t, C)[:, :length]

    def _reduce_scatter(self, x: Tensor) -> Tensor:
        shards = self._shards(x).flatten(0, 1).contiguous()  # (processes * B, t, C)
        return COLLECTIVES.wait_tensor(COLLECTIVES.reduce_scatter_tensor(shards, "sum", self.size, self.group))

    def _own_shard(self, x: Tensor) -> Tensor:
        return self._shards(x)[self.rank].clone(memory_format=torch.contiguous_format)

    def _shards(self, x: Tensor) -> Tensor:
        """All shards of sequences, (processes, B, t, C)."""
        B, T, C = x.shape
        t = -(-T // self.size)
        return F.pad(x, (0, 0, 0, t * self.size - T)).view(B, self.size, t, C).transpose(0, 1)


class _Collective(torch.autograd.Function):
    """One exchange on the way forward, another on the way back."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, collective: Exchange, grad_collective: Exchange) -> Tensor:
        ctx.grad_collective = grad_collective
        return collective(x)

    @staticmethod
    def backward(ctx: FunctionCtx, d: Tensor) -> tuple[Tensor, None, None]:
        return ctx.grad_collective(d), None, None


def _identity(x: Tensor) -> Tensor:
    return x.view_as(x)


def sum_gradients(parameters: list[Tensor], group: dist.ProcessGroup) -> None:
    """Add up what the processes of a group know of the gradients of parameters that each of them holds, in place."""
    gradients = [local_shard(parameter.grad) for parameter in parameters if parameter.grad is not None]
    if gradients:
        total = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(total, group=group)
        for gradient, summed in zip(gradients, total.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(summed.view_as(gradient))


def average(gradient: Tensor, group: dist.ProcessGroup) -> None:
    """The mean over the processes of a group, in place."""
    dist.all_reduce(gradient, group=group)
    gradient /= group.size()
