"""A vocabulary cut among processes, each of which makes the logits of its own words (Shoeybi et al. 2019, 3)."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard


class VocabShard(NamedTuple):
    """The words of this process, among those of the processes of a group; all of them ask for the same tokens."""

    first: int
    vocab_size: int  # words of all
    shard_size: int  # words of the process that has most
    group: dist.ProcessGroup

    def find(self, tokens: Tensor, n_tokens: int) -> tuple[Tensor, Tensor]:
        """Which tokens are among the `n_tokens` of this process, and their ids there; 0 for others."""
        local_ids = tokens - self.first
        is_local = (local_ids >= 0) & (local_ids < n_tokens)
        return is_local, local_ids.where(is_local, 0)

    def cross_entropy_(self, logits: Tensor, labels: Tensor, *, label_smoothing: float, z_loss: float) -> Tensor:
        """The summed loss of a chunk of all words; its logits (n, V of this process) become their own gradient."""
        n, n_tokens = logits.shape
        is_local, local_ids = self.find(labels, n_tokens)
        rows = torch.arange(n, device=labels.device)
        peak = self._all(logits.amax(-1), dist.ReduceOp.MAX)
        goal = logits[rows, local_ids].where(is_local, 0)
        mean = logits.sum(-1) / self.vocab_size if label_smoothing else torch.zeros_like(goal)
        logits.sub_(peak[:, None]).exp_()
        total, goal, mean = self._all(torch.stack([logits.sum(-1), goal, mean]), dist.ReduceOp.SUM)
        logsumexp = peak + total.log()
        logits.mul_(((1 + 2 * z_loss * logsumexp) / total)[:, None])
        logits[rows, local_ids] -= (1 - label_smoothing) * is_local
        if label_smoothing:
            logits.sub_(label_smoothing / self.vocab_size)
        return (logsumexp - torch.lerp(goal, mean, label_smoothing) + z_loss * logsumexp.square()).sum()

    def argmax(self, logits: Tensor) -> Tensor:
        """The word of the highest logit among those of all processes, (n,); the first of several."""
        peak, local_id = logits.max(-1)
        highest = self._all(peak.clone(), dist.ReduceOp.MAX)
        return self._all((local_id + self.first).where(peak == highest, self.vocab_size), dist.ReduceOp.MIN)

    def sum_(self, value: Tensor) -> None:
        """Add up what the processes know, in place."""
        self._all(value, dist.ReduceOp.SUM)

    def _all(self, value: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        dist.all_reduce(value, operation, group=self.group)
        return value


def local_vocab_shard(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None, VocabShard | None]:
    """What this process holds of a head (V, C) and its bias (V,), and which words those are; None where it holds all."""
    if not isinstance(weight, DTensor):
        return weight, bias, None
    mesh = weight.device_mesh
    if weight.placements != (Shard(0),):
        raise ValueError(f"a head lies over its words, in one dimension of processes, not as {weight.placements}")
    shard_size = -(-weight.shape[0] // mesh.size())
    shard = VocabShard(mesh.get_local_rank() * shard_size, weight.shape[0], shard_size, mesh.get_group())
    return weight.to_local(), None if bias is None else bias.to_local(), shard
