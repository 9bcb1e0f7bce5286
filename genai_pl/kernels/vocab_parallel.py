"""A vocabulary cut among processes, each of which makes the logits of its own words (Shoeybi et al. 2019, 3)."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard


class VocabularyPart(NamedTuple):
    """The words of this process, among those of the processes of a group; all of them ask for the same tokens."""

    first: int
    total: int  # words of all
    room: int  # words of the process that has most
    group: dist.ProcessGroup

    def find(self, tokens: Tensor, n_words: int) -> tuple[Tensor, Tensor]:
        """Which tokens are among the `n_words` of this process, and their places there; 0 for others."""
        places = tokens - self.first
        own = (places >= 0) & (places < n_words)
        return own, places.where(own, 0)

    def cross_entropy_(self, logits: Tensor, labels: Tensor, *, label_smoothing: float, z_loss: float) -> Tensor:
        """The summed loss of a chunk of all words; its logits (n, V of this process) become their own gradient."""
        n, n_words = logits.shape
        own, places = self.find(labels, n_words)
        rows = torch.arange(n, device=labels.device)
        peak = self._all(logits.amax(-1), dist.ReduceOp.MAX)
        goal = logits[rows, places].where(own, 0)
        mean = logits.sum(-1) / self.total if label_smoothing else torch.zeros_like(goal)
        logits.sub_(peak[:, None]).exp_()
        total, goal, mean = self._all(torch.stack([logits.sum(-1), goal, mean]), dist.ReduceOp.SUM)
        logsumexp = peak + total.log()
        logits.mul_(((1 + 2 * z_loss * logsumexp) / total)[:, None])
        logits[rows, places] -= (1 - label_smoothing) * own
        if label_smoothing:
            logits.sub_(label_smoothing / self.total)
        return (logsumexp - torch.lerp(goal, mean, label_smoothing) + z_loss * logsumexp.square()).sum()

    def argmax(self, logits: Tensor) -> Tensor:
        """The word of the highest logit among those of all processes, (n,); the first of several."""
        peak, place = logits.max(-1)
        highest = self._all(peak.clone(), dist.ReduceOp.MAX)
        return self._all((place + self.first).where(peak == highest, self.total), dist.ReduceOp.MIN)

    def sum_(self, value: Tensor) -> None:
        """Add up what the processes know, in place."""
        self._all(value, dist.ReduceOp.SUM)

    def _all(self, value: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        dist.all_reduce(value, operation, group=self.group)
        return value


def own_words(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None, VocabularyPart | None]:
    """What this process holds of a head (V, C) and its bias (V,), and which words those are; None where it holds all."""
    if not isinstance(weight, DTensor):
        return weight, bias, None
    mesh = weight.device_mesh
    if weight.placements != (Shard(0),):
        raise ValueError(f"a head lies over its words, in one dimension of processes, not as {weight.placements}")
    room = -(-weight.shape[0] // mesh.size())
    part = VocabularyPart(mesh.get_local_rank() * room, weight.shape[0], room, mesh.get_group())
    return weight.to_local(), None if bias is None else bias.to_local(), part
