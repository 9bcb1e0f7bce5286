"""Hidden states between the parts of blocks in pieces along the sequence (Korthikanti et al. 2022, 4.2.2)."""

from functools import partial

import torch
from torch import Tensor, nn

from genai_pl.distributed.tensor_parallel_group import Peers
from genai_pl.models.transformer import Transformer


class Pieces:
    """The hidden states of a stack: whole up to its first block and after its last norm, in pieces between them.

    Norms, dropout and residual additions are computed of pieces; attention and MLP are given whole sequences.
    """

    def __init__(self, stack: Transformer, peers: Peers) -> None:
        self.peers, self.length = peers, 0  # of the sequences under way
        stack.blocks[0].register_forward_pre_hook(self._cut)
        stack.norm.register_forward_hook(self._join)
        for block in stack.blocks:
            block.dropout.forward = partial(_dropped, block.dropout, peers.rank)

    def enter(self, piece: Tensor) -> Tensor:
        """What a part of a block is given."""
        return self.peers.gathered(piece, self.length)

    def leave(self, x: Tensor) -> Tensor:
        """What the processes make of it, added up."""
        return self.peers.scattered(x)

    def _cut(self, block: nn.Module, given: tuple) -> tuple:
        x, *others = given
        self.length = x.shape[1]
        return self.peers.cut(x), *others

    def _join(self, norm: nn.Module, given: tuple, hidden: Tensor) -> Tensor:
        return self.peers.joined(hidden, self.length)


@torch.compiler.disable(reason="a generator of its own for each call")
def _dropped(dropout: nn.Dropout, rank: int, x: Tensor) -> Tensor:
    """Dropout of a piece that draws other numbers than those of other processes, whose generators go on as this one's."""
    if not dropout.training or dropout.p == 0.0:
        return x
    seed = int(torch.randint(2**62, ()))
    generator = torch.Generator(x.device).manual_seed(seed + rank)
    kept = torch.rand(x.shape, device=x.device, generator=generator) >= dropout.p
    return torch.where(kept, x / (1 - dropout.p), 0)
