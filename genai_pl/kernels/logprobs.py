"""Log-probabilities of tokens under a linear layer, with a backward pass that computes the logits again.

For losses whose weight of each token depends on the log-probabilities themselves (DPO, PPO, GRPO): gradients cannot be
made in the forward pass as in `cross_entropy.py`, and to keep the logits would take the memory that chunks save.
"""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from genai_pl.kernels.chunked_logits import Projection, chunks, matmul_dtype, softmax_
from genai_pl.kernels.uncompiled import uncompiled


@uncompiled("its loop over chunks is as fast in eager mode, and its length depends on the labels")
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    ignore_index: int = -100,
    chunk_tokens: int | None = None,
) -> Tensor:
    """log p(label) of hidden @ weight.T (+ bias) for every token, 0 where the label is ignored, in float32 at least.

    hidden is (..., C), weight (V, C), bias (V,), labels (...); the others are those of `linear_cross_entropy`. Backward
    costs one product more than there, for the logits.
    """
    flat = hidden.reshape(-1, hidden.shape[-1])  # (N, C)
    logprobs = _LinearLogprobs.apply(flat, weight, bias, labels.reshape(-1), softcap, ignore_index, chunk_tokens)
    return logprobs.view(labels.shape)


class _LinearLogprobs(torch.autograd.Function):
    """log p of labels (N,) with gradients of hidden (N, C), weight (V, C) and bias (V,), all of which are saved."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        softcap: float | None,
        ignore_index: int,
        chunk_tokens: int | None,
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias, labels)
        dtype = matmul_dtype(hidden)
        ctx.projection = {"softcap": softcap, "matmul_dtype": dtype}
        ctx.chunks = {
            "vocab_size": weight.shape[0],
            "ignore_index": ignore_index,
            "chunk_tokens": chunk_tokens,
            "dtype": dtype,
        }
        projection = Projection(hidden, weight, bias, **ctx.projection)
        logprobs = hidden.new_zeros(labels.shape, dtype=projection.dtype)
        for rows in chunks(labels, **ctx.chunks):
            logits = projection.logits(rows)
            logprobs[rows] = _logprobs_(projection, logits, labels[rows])
        return logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, d_logprobs: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels = ctx.saved_tensors
        projection = Projection(hidden, weight, bias, **ctx.projection)
        projection.track(ctx.needs_input_grad)
        for rows in chunks(labels, **ctx.chunks):
            logits, d = projection.logits(rows), d_logprobs[rows]
            _gradients_(projection, logits, labels[rows], d)
            projection.add_gradients(rows, logits)
        return *projection.gradients(), None, None, None, None


def _logprobs_(projection: Projection, logits: Tensor, labels: Tensor) -> Tensor:
    """log p(label) of each token of a chunk, (n,); overwrites the products (n, V)."""
    if projection.fused:
        return -projection.cross_entropy_(logits, labels, with_gradients=False)
    logprobs = torch.empty(labels.shape, dtype=projection.dtype, device=labels.device)
    for rows, block in projection.float_blocks(logits):
        target = block.gather(1, labels[rows, None])
        logprobs[rows] = (target - softmax_(block)).squeeze(1)
    return logprobs


def _gradients_(projection: Projection, logits: Tensor, labels: Tensor, d_logprobs: Tensor) -> None:
    """Turn the products (n, V) of a chunk into their gradient, (onehot - softmax) d_logprobs, in place."""
    if projection.fused:
        projection.cross_entropy_(logits, labels, weights=-d_logprobs)
        return
    for rows, block in projection.float_blocks(logits):
        softmax_(block)
        block.mul_(-d_logprobs[rows, None])
        block[torch.arange(block.shape[0], device=labels.device), labels[rows]] += d_logprobs[rows]
