"""Hidden states between the parts of blocks in pieces along the sequence (Korthikanti et al. 2022, 4.2.2)."""

from functools import partial

import torch
from torch import Tensor, nn

from genai_pl.distributed.tensor_parallel_group import TensorParallelGroup
from genai_pl.models.transformer import Transformer


class SequenceShards:
    """The hidden states of a stack: whole up to its first block and after its last norm, in pieces between them.

    Norms, dropout and residual additions are computed of pieces; attention and MLP are given whole sequences.
    """

    def __init__(self, stack: Transformer, group: TensorParallelGroup) -> None:
        self.group, self.length = group, 0  # of the sequences under way
        stack.blocks[0].register_forward_pre_hook(self._shard)
        stack.norm.register_forward_hook(self._gather)
        for block in stack.blocks:
            block.dropout.forward = partial(_shard_dropout, block.dropout, group.rank)

    def enter_region(self, shard: Tensor) -> Tensor:
        """What a part of a block is given."""
        return self.group.gather_from_sequence(shard, self.length)

    def leave_region(self, x: Tensor) -> Tensor:
        """What the processes make of it, added up."""
        return self.group.reduce_scatter_to_sequence(x)

    def _shard(self, block: nn.Module, args: tuple) -> tuple:
        x, *rest = args
        self.length = x.shape[1]
        return self.group.scatter_to_sequence(x), *rest

    def _gather(self, norm: nn.Module, args: tuple, hidden: Tensor) -> Tensor:
        return self.group.gather_without_grad_sum(hidden, self.length)


@torch.compiler.disable(reason="a generator of its own for each call")
def _shard_dropout(dropout: nn.Dropout, rank: int, x: Tensor) -> Tensor:
    """Dropout of a piece that draws other numbers than those of other processes, whose generators go on as this one's."""
    if not dropout.training or dropout.p == 0.0:
        return x
    seed = int(torch.randint(2**62, ()))
    generator = torch.Generator(x.device).manual_seed(seed + rank)
    keep = torch.rand(x.shape, device=x.device, generator=generator) >= dropout.p
    return torch.where(keep, x / (1 - dropout.p), 0)
