"""Context-parallel group: ranks that divide the tokens of each row among them, and what they exchange.

A row of T tokens is cut into 2 n chunks for n ranks, and rank i holds chunks i and 2n - 1 - i. Under a causal mask a chunk
costs what stands before it, so every rank has an early and a late one and all have the same work (Llama Team 2024,
section 3.3.2). Keys and values are gathered for attention, and their gradients summed and scattered; hidden states never
travel. Rows whose length does not divide are padded at their end.

    method         forward       backward
    gather_keys    all-gather    reduce-scatter
    gather_values  all-gather    own chunks
    total          all-reduce    identity

After the last two all ranks do the same work, so a rank's gradient is that through its own tokens, and the sum over ranks
is the whole.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from genai_pl.distributed.tensor_parallel_group import COLLECTIVES, Collective, identity


@dataclass(frozen=True)
class ContextGroup:
    """The ranks that share the tokens of a row, as a constant that autograd functions can hold.

    group: name of the process group, which functional collectives take instead of the group object
    size: n, the number of ranks; of one rank alone every method returns its argument
    rank: number of this rank in the group
    """

    group: str = ""
    size: int = 1
    rank: int = 0

    @classmethod
    def of(cls, group: dist.ProcessGroup) -> "ContextGroup":
        """The constant for a process group of which this rank is a member."""
        return cls(group.group_name, group.size(), group.rank())

    def padded(self, length: int) -> int:
        """The length S of a row of `length` tokens with its padding: the next multiple of 2 n, or the same for one rank."""
        return length if self.size == 1 else -(-length // (2 * self.size)) * 2 * self.size

    def chunk_starts(self, length: int) -> tuple[int, int]:
        """The columns at which this rank's two chunks of a padded row begin.

        >>> [ContextGroup(size=2, rank=rank).chunk_starts(8) for rank in range(2)]
        [(0, 6), (2, 4)]
        """
        c = length // (2 * self.size)
        return self.rank * c, (2 * self.size - 1 - self.rank) * c

    def shard(self, x: Tensor, fill: int = 0) -> Tensor:
        """This rank's chunks (..., t) of values of whole rows (..., T), which every rank holds; fill: of the padding.

        >>> ContextGroup(size=2, rank=0).shard(torch.arange(7), fill=-100).tolist()
        [0, 1, 6, -100]
        """
        if self.size == 1:
            return x
        T = x.shape[-1]
        S = self.padded(T)
        x = F.pad(x, (0, S - T), value=fill)
        c = S // (2 * self.size)
        return torch.cat([x[..., start : start + c] for start in self.chunk_starts(S)], dim=-1)

    def gather_keys(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, K, S, D) of whole rows from those of this rank's tokens, (B, K, t, D)."""
        if k.shape != v.shape:
            return self._gather_sequence(k), self._gather_sequence(v)
        keys, values = self._gather_sequence(torch.stack([k, v])).unbind(0)
        return keys, values

    def gather_values(self, values: Tensor, length: int) -> Tensor:
        """Values of whole rows (B, T) from those of this rank's tokens, (B, t), with which all ranks then do the same."""
        if self.size == 1:
            return values
        return Collective.apply(values[..., None], self._all_gather, self._own)[..., :length, 0]

    def total(self, x: Tensor) -> Tensor:
        """The sum over ranks of a sum over their tokens."""
        return x if self.size == 1 else Collective.apply(x, self._all_reduce, identity)

    def _gather_sequence(self, x: Tensor) -> Tensor:
        """(..., S, D) from (..., t, D); gradients are summed over ranks."""
        return Collective.apply(x, self._all_gather, self._reduce_scatter)

    def _all_reduce(self, x: Tensor) -> Tensor:
        return COLLECTIVES.wait_tensor(COLLECTIVES.all_reduce(x.contiguous(), "sum", self.group))

    def _all_gather(self, x: Tensor) -> Tensor:
        """Whole rows (..., S, D) in their order, of the chunks (..., t, D) of all ranks."""
        *lead, t, D = x.shape
        shards = COLLECTIVES.all_gather_into_tensor(x.reshape(1, -1, t, D).contiguous(), self.size, self.group)
        shards = COLLECTIVES.wait_tensor(shards).view(self.size, -1, 2, t // 2, D)  # (n, M, 2, c, D)
        # early chunks by rank, then late ones from the last rank on
        chunks = torch.cat([shards[:, :, 0], shards[:, :, 1].flip(0)])  # (2n, M, c, D)
        return chunks.transpose(0, 1).reshape(*lead, self.size * t, D)

    def _chunks_by_rank(self, x: Tensor) -> Tensor:
        """The chunks of each rank, (n, M, t, D), of whole rows (..., S, D): the inverse of `_all_gather`."""
        S, D = x.shape[-2:]
        chunks = x.reshape(-1, 2 * self.size, S // (2 * self.size), D).transpose(0, 1)  # (2n, M, c, D)
        return torch.cat([chunks[: self.size], chunks[self.size :].flip(0)], dim=2)

    def _own(self, x: Tensor) -> Tensor:
        """This rank's chunks of whole rows, a copy."""
        own = self._chunks_by_rank(x)[self.rank]
        return own.reshape(*x.shape[:-2], *own.shape[-2:])

    def _reduce_scatter(self, x: Tensor) -> Tensor:
        """This rank's chunks of the sum over ranks."""
        shards = self._chunks_by_rank(x).contiguous()
        own = COLLECTIVES.wait_tensor(COLLECTIVES.reduce_scatter_tensor(shards, "sum", self.size, self.group))
        return own.view(*x.shape[:-2], *own.shape[-2:])


ALONE = ContextGroup()
