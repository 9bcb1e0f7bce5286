"""Sequence parallelism: hidden states sharded along the sequence (Korthikanti et al. 2022, 4.2.2).

Tensor parallelism alone repeats norms, dropout and residual additions on every rank, and keeps their activations
`size` times. Here each rank computes them on its shard of the sequence; attention and MLP gather it on entry and
reduce-scatter their output, which sends as much as the all-reduce that they replace.
"""

from functools import partial

import torch
from torch import Tensor, nn

from genai_pl.distributed.tensor_parallel_group import TensorParallelGroup
from genai_pl.kernels.uncompiled import uncompiled
from genai_pl.models.transformer import Transformer


class SequenceShards:
    """The hidden states of a transformer: full up to its first block and after its last norm, sharded between them.

    stack: the transformer, to whose first block, last norm and dropouts hooks are added
    group: its tensor-parallel group

    `length` is the full length of the current sequences, which the last shard's padding hides.
    """

    def __init__(self, stack: Transformer, group: TensorParallelGroup) -> None:
        self.group, self.length = group, 0
        stack.blocks[0].register_forward_pre_hook(self._shard)
        stack.norm.register_forward_hook(self._gather)
        for block in stack.blocks:
            block.dropout.forward = partial(_shard_dropout, block.dropout, group.rank)

    def enter_region(self, shard: Tensor) -> Tensor:
        """The full sequences (B, T, C) for attention or MLP, of shards."""
        return self.group.gather_from_sequence(shard, self.length)

    def leave_region(self, x: Tensor) -> Tensor:
        """The shard of the summed partial outputs of attention or MLP."""
        return self.group.reduce_scatter_to_sequence(x)

    def _shard(self, block: nn.Module, args: tuple) -> tuple:
        """Before the first block: note the full length, and keep this rank's shard."""
        x, *rest = args
        self.length = x.shape[1]
        return self.group.scatter_to_sequence(x), *rest

    def _gather(self, norm: nn.Module, args: tuple, hidden: Tensor) -> Tensor:
        """After the last norm: the full sequences again."""
        return self.group.gather_without_grad_sum(hidden, self.length)


@uncompiled("a generator of its own for each call")
def _shard_dropout(dropout: nn.Dropout, rank: int, x: Tensor) -> Tensor:
    """Dropout of a shard, with other random numbers on each rank.

    All ranks draw the same seed from the global generator, which keeps it in step, and add their rank.
    """
    if not dropout.training or dropout.p == 0.0:
        return x
    seed = int(torch.randint(2**62, ()))
    generator = torch.Generator(x.device).manual_seed(seed + rank)
    keep = torch.rand(x.shape, device=x.device, generator=generator) >= dropout.p
    return torch.where(keep, x / (1 - dropout.p), 0)
