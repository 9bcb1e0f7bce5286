"""Cross entropy of a linear layer, whose gradients are made in the forward pass, chunk by chunk.

The logits of 4096 tokens and GPT-2's vocabulary take 785 MiB, and autograd keeps three of them; here one chunk exists.
The loss is a sum over tokens, so the gradient of each chunk is known as soon as its logits are, up to the one factor that
arrives in the backward pass and scales everything. Products: one for logits and two for gradients, as with autograd.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from genai_pl.kernels.chunked_logits import Projection, Rows, chunks, matmul_dtype, softmax_
from genai_pl.kernels.uncompiled import uncompiled
from genai_pl.kernels.vocab_parallel import VocabShard, local_vocab_shard


class GroupSums(NamedTuple):
    """Sums of the loss by group of tokens: groups (...) of integers, like labels, and sums (K,), which are added to."""

    groups: Tensor
    sums: Tensor


class _Options(NamedTuple):
    """The arguments of `linear_cross_entropy` that need no gradient, and the shard of the vocabulary, None for all of it."""

    softcap: float | None
    label_smoothing: float
    z_loss: float
    ignore_index: int
    chunk_tokens: int | None
    with_gradients: bool
    repeatable: bool
    shard: VocabShard | None
    by_group: GroupSums | None


_repeatable: ContextVar[bool] = ContextVar("repeatable", default=False)


@contextmanager
def repeatable_backward() -> Iterator[None]:
    """Context in which the loss keeps its gradients, for code that runs its backward pass more than once."""
    token = _repeatable.set(True)
    try:
        yield
    finally:
        _repeatable.reset(token)


@uncompiled("its loop over chunks is as fast in eager mode, and its length depends on the labels")
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    ignore_index: int = -100,
    chunk_tokens: int | None = None,
    by_group: GroupSums | None = None,
) -> Tensor:
    """Sum over labelled tokens of the cross entropy of hidden @ weight.T (+ bias), plus z_loss * logsumexp**2.

    hidden           (..., C), with weight (V, C), bias (V,) and labels (...); labels equal to ignore_index do not count
    softcap          logits become softcap * tanh(logits / softcap)
    label_smoothing  the share of the target that all V words have equally (Szegedy et al. 2016)
    z_loss           the factor of logsumexp**2, which keeps logits from drifting (PaLM, section 5)
    chunk_tokens     tokens at a time; None: as many as the memory budget holds
    by_group         groups of the tokens, and where the sums of the loss by group are added, in place and without gradient

    The sum is float32 at least, and the caller divides it by its own number of targets. Backward runs once: gradients are
    made with the loss, and given away. Processes that hold shards of the vocabulary (a DTensor weight) and have the same
    hidden and labels call it together, and each gets the sum over all words.

    >>> loss = linear_cross_entropy(torch.zeros(2, 3), torch.zeros(4, 3), torch.tensor([1, -100]))
    >>> round(loss.item(), 4)  # log 4, of one token
    1.3863
    """
    # inside the Function grad mode is always off, and inputs look as if they needed gradients under no_grad too
    with_gradients = torch.is_grad_enabled()
    weight, bias, shard = local_vocab_shard(weight, bias)
    by_group = by_group and by_group._replace(groups=by_group.groups.reshape(-1))
    settings = (softcap, label_smoothing, z_loss, ignore_index, chunk_tokens, with_gradients, _repeatable.get())
    options = _Options(*settings, shard, by_group)
    hidden = hidden.reshape(-1, hidden.shape[-1])  # (N, C)
    return _LinearCrossEntropy.apply(hidden, weight, bias, labels.reshape(-1), options)


class _LinearCrossEntropy(torch.autograd.Function):
    """The sum, with gradients of hidden (N, C), weight (V, C) and bias (V,) made on the way."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, options: _Options
    ) -> Tensor:
        shard, precision = options.shard, {"softcap": options.softcap, "matmul_dtype": matmul_dtype(hidden)}
        projection = Projection(hidden, weight, bias, may_fuse=shard is None, **precision)
        if options.with_gradients:
            projection.track(ctx.needs_input_grad)
        # chunk by chunk: logits, loss and their gradient in place, gradients of the inputs
        total = hidden.new_zeros((), dtype=projection.dtype)
        for rows in chunks(
            labels,
            vocab_size=weight.shape[0] if shard is None else shard.shard_size,
            ignore_index=options.ignore_index,
            chunk_tokens=options.chunk_tokens,
            dtype=precision["matmul_dtype"],
        ):
            logits = projection.logits(rows)
            total += _loss_(projection, logits, labels[rows], rows, options)
            if projection.tracks:
                projection.add_gradients(rows, logits)
        # each process knows the gradient of hidden states through its own words
        if shard is not None and projection.d_hidden is not None:
            shard.sum_(projection.d_hidden)
        ctx.gradients, ctx.repeatable = projection.gradients(), options.repeatable
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, d_total: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.repeatable:
            return *(None if gradient is None else gradient * d_total for gradient in ctx.gradients), None, None
        # scaled in place, which spares a second (V, C) and leaves nothing for a second backward
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("linear_cross_entropy gives its gradients once: call it again for a second backward")
        return *(None if gradient is None else gradient.mul_(d_total) for gradient in gradients), None, None


def _loss_(projection: Projection, logits: Tensor, labels: Tensor, rows: Rows, options: _Options) -> Tensor:
    """The summed loss of a chunk by the code for its weight; its products (n, V) become their own gradient if any is tracked.

    rows: the chunk's tokens, whose groups' sums are added to.
    """
    groups = None if options.by_group is None else options.by_group.groups[rows]
    extra = {"label_smoothing": options.label_smoothing, "z_loss": options.z_loss}
    if projection.fused:
        losses = projection.cross_entropy_(logits, labels, **extra, with_gradients=projection.tracks)
        _add_by_group(options.by_group, groups, losses)
        return losses.sum()
    # a shard communicates in each block
    total = torch.zeros((), dtype=projection.dtype, device=logits.device)
    for part, block in projection.float_blocks(logits, whole=options.shard is not None):
        loss_ = _eager_loss_ if options.shard is None else options.shard.cross_entropy_
        losses = loss_(block, labels[part], **extra)
        _add_by_group(options.by_group, None if groups is None else groups[part], losses)
        total += losses.sum()
    return total


def _add_by_group(by_group: GroupSums | None, groups: Tensor | None, losses: Tensor) -> None:
    """Add the losses (n,) of tokens to the sums of their groups (n,)."""
    if by_group is not None:
        by_group.sums.index_add_(0, groups, losses.to(by_group.sums.dtype))


def _eager_loss_(logits: Tensor, labels: Tensor, *, label_smoothing: float, z_loss: float) -> Tensor:
    """The losses (n,) of some tokens in tensor operations; their logits (n, V) become their own gradient.

    With p the softmax and q the smoothed target the gradient is (1 + 2 z_loss logsumexp) p - q, written over the
    logits without another (n, V).
    """
    n, V = logits.shape
    goal = logits.gather(1, labels[:, None])  # (n, 1)
    if label_smoothing:
        goal = torch.lerp(goal, logits.mean(-1, keepdim=True), label_smoothing)
    logsumexp = softmax_(logits)
    if z_loss:
        logits.mul_(1 + 2 * z_loss * logsumexp)
    logits[torch.arange(n, device=labels.device), labels] -= 1 - label_smoothing
    if label_smoothing:
        logits.sub_(label_smoothing / V)
    return (logsumexp - goal + z_loss * logsumexp.square()).reshape(n)
