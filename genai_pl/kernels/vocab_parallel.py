"""Vocabulary parallelism: each process of a group holds the embedding or head of its own range of tokens.

A process computes logits of its shard only. A loss needs two small reductions per chunk, the largest logit and then the sum
of exponentials with the label's logit, and never the logits of other processes (Shoeybi et al. 2019, section 3).
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn


class VocabShard(NamedTuple):
    """The token ids of this process, a range of the vocabulary; all processes of the group have the same hidden states.

    first       the first token id of this process
    vocab_size  V, of all processes
    shard_size  token ids per process; the last may have fewer
    group       the processes
    """

    first: int
    vocab_size: int
    shard_size: int
    group: dist.ProcessGroup

    def find(self, tokens: Tensor, n_tokens: int) -> tuple[Tensor, Tensor]:
        """True for tokens (...) that are among the n_tokens of this process, and their ids counted from its first; 0 for others.

        n_tokens: rows that this process holds.
        """
        local_ids = tokens - self.first
        is_local = (local_ids >= 0) & (local_ids < n_tokens)
        return is_local, local_ids.where(is_local, 0)

    def cross_entropy_(self, logits: Tensor, labels: Tensor, *, label_smoothing: float, z_loss: float) -> Tensor:
        """The losses (n,) of a chunk over the whole vocabulary; logits (n, n_tokens of this process) become their gradient.

        The arithmetic is that of `cross_entropy._eager_loss_`, with sums over words taken over the group.
        """
        n, n_tokens = logits.shape
        is_local, local_ids = self.find(labels, n_tokens)
        rows = torch.arange(n, device=labels.device)
        # over the group: the largest logit, then the sum of exponentials and the label's logit
        peak = self._all_reduce(logits.amax(-1), dist.ReduceOp.MAX)
        goal = logits[rows, local_ids].where(is_local, 0)
        mean = logits.sum(-1) / self.vocab_size if label_smoothing else torch.zeros_like(goal)
        logits.sub_(peak[:, None]).exp_()
        total, goal, mean = self._all_reduce(torch.stack([logits.sum(-1), goal, mean]), dist.ReduceOp.SUM)
        # the gradient in place, each process its own columns
        logsumexp = peak + total.log()
        logits.mul_(((1 + 2 * z_loss * logsumexp) / total)[:, None])
        logits[rows, local_ids] -= (1 - label_smoothing) * is_local
        if label_smoothing:
            logits.sub_(label_smoothing / self.vocab_size)
        return logsumexp - torch.lerp(goal, mean, label_smoothing) + z_loss * logsumexp.square()

    def argmax(self, logits: Tensor) -> Tensor:
        """The token of the highest logit over the whole vocabulary, (n,); the first of several."""
        peak, local_id = logits.max(-1)
        highest = self._all_reduce(peak.clone(), dist.ReduceOp.MAX)
        return self._all_reduce((local_id + self.first).where(peak == highest, self.vocab_size), dist.ReduceOp.MIN)

    def sum_(self, value: Tensor) -> None:
        """Sum a tensor over the group, in place."""
        self._all_reduce(value, dist.ReduceOp.SUM)

    def _all_reduce(self, value: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        dist.all_reduce(value, operation, group=self.group)
        return value


def local_vocab_shard(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None, VocabShard | None]:
    """This process's rows of a head (V, C) and its bias (V,), and the range of tokens; None for a plain tensor, which has all.

    ValueError for a DTensor that is not sharded over tokens alone.
    """
    if type(weight) in (Tensor, nn.Parameter):
        return weight, bias, None
    from torch.distributed.tensor import DTensor, Shard  # late: a third of a second that plain tensors need not spend

    if not isinstance(weight, DTensor):
        return weight, bias, None
    mesh = weight.device_mesh
    if weight.placements != (Shard(0),):
        raise ValueError(
            f"a head must be sharded over its tokens, in one dimension of processes, not as {weight.placements}"
        )
    shard_size = -(-weight.shape[0] // mesh.size())
    shard = VocabShard(mesh.get_local_rank() * shard_size, weight.shape[0], shard_size, mesh.get_group())
    return weight.to_local(), None if bias is None else bias.to_local(), shard
