"""What processes that divide a layer tell each other, and what they tell each other of its gradients."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from genai_pl.distributed.dtensor import local

Exchange = Callable[[Tensor], Tensor]
COLLECTIVES = torch.ops._c10d_functional  # those that torch.compile can follow


@dataclass(frozen=True)
class Peers:
    """The processes of a tensor-parallel group, in pairs of what follows each other in a layer.

    copied and summed are f and g of Shoeybi et al. 2019, 3; gathered and scattered are g and g-bar of Korthikanti et al.
    2022, 4.2.2, on pieces of sequences (B, T, C) along T, the last of which end in zeros where T does not divide.
    """

    group: str  # its name
    size: int
    rank: int

    @classmethod
    def of(cls, group: dist.ProcessGroup) -> "Peers":
        """Those of a group that this process is in."""
        return cls(group.group_name, group.size(), group.rank())

    def copied(self, x: Tensor) -> Tensor:
        """What all have, of which each uses a part: its gradient is the sum of theirs."""
        return _Exchanged.apply(x, _same, self._sum)

    def summed(self, x: Tensor) -> Tensor:
        """The sum of what each has, with which all do the same."""
        return _Exchanged.apply(x, self._sum, _same)

    def gathered(self, piece: Tensor, length: int) -> Tensor:
        """The sequences of that length, of whose channels each uses a part."""
        return _Exchanged.apply(piece, partial(self._join, length), self._sum_piece)

    def scattered(self, x: Tensor) -> Tensor:
        """This process's piece of the sum of what each has."""
        return _Exchanged.apply(x, self._sum_piece, partial(self._join, x.shape[1]))

    def cut(self, x: Tensor) -> Tensor:
        """This process's piece of what all have."""
        return _Exchanged.apply(x, self._piece, partial(self._join, x.shape[1]))

    def joined(self, piece: Tensor, length: int) -> Tensor:
        """The sequences of that length, with which all do the same."""
        return _Exchanged.apply(piece, partial(self._join, length), self._piece)

    def _sum(self, x: Tensor) -> Tensor:
        return COLLECTIVES.wait_tensor(COLLECTIVES.all_reduce(x.contiguous(), "sum", self.group))

    def _join(self, length: int, piece: Tensor) -> Tensor:
        B, t, C = piece.shape
        pieces = COLLECTIVES.all_gather_into_tensor(piece.contiguous(), self.size, self.group)  # (processes * B, t, C)
        pieces = COLLECTIVES.wait_tensor(pieces).view(self.size, B, t, C)
        return pieces.transpose(0, 1).reshape(B, self.size * t, C)[:, :length]

    def _sum_piece(self, x: Tensor) -> Tensor:
        pieces = self._pieces(x).flatten(0, 1).contiguous()  # (processes * B, t, C)
        return COLLECTIVES.wait_tensor(COLLECTIVES.reduce_scatter_tensor(pieces, "sum", self.size, self.group))

    def _piece(self, x: Tensor) -> Tensor:
        return self._pieces(x)[self.rank].clone(memory_format=torch.contiguous_format)

    def _pieces(self, x: Tensor) -> Tensor:
        """All pieces of sequences, (processes, B, t, C)."""
        B, T, C = x.shape
        t = -(-T // self.size)
        return F.pad(x, (0, 0, 0, t * self.size - T)).view(B, self.size, t, C).transpose(0, 1)


class _Exchanged(torch.autograd.Function):
    """One exchange on the way forward, another on the way back."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, there: Exchange, back: Exchange) -> Tensor:
        ctx.back = back
        return there(x)

    @staticmethod
    def backward(ctx: FunctionCtx, d: Tensor) -> tuple[Tensor, None, None]:
        return ctx.back(d), None, None


def _same(x: Tensor) -> Tensor:
    return x.view_as(x)


def sum_gradients(parameters: list[Tensor], group: dist.ProcessGroup) -> None:
    """Add up what the processes of a group know of the gradients of parameters that each of them holds, in place."""
    gradients = [local(parameter.grad) for parameter in parameters if parameter.grad is not None]
    if gradients:
        total = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(total, group=group)
        for gradient, summed in zip(gradients, total.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(summed.view_as(gradient))


def average(gradient: Tensor, group: dist.ProcessGroup) -> None:
    """The mean over the processes of a group, in place."""
    dist.all_reduce(gradient, group=group)
    gradient /= group.size()
