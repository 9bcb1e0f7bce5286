"""Softmax cross entropy of a chunk of logits as one Triton kernel: logits in, losses out, gradients in place of the logits.

The softmax is read online over the vocabulary (Milakov and Gimelshein 2018), so a row may have any length; the second
pass over it, which writes the gradient, finds it in the cache. Writing gradients over logits is Liger Kernel's idea.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from genai_pl.kernels.flash.launch import Launch

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
BLOCK_V = 4096  # 16 numbers per thread: two loads of 16 bytes in flight for bf16, and no register spilled


class Softmax(NamedTuple):
    """The options of the kernel.

    bias             (V,), added to the products first
    softcap          caps the sum next; None: no cap
    label_smoothing  the share of the target that all words have equally
    z_loss           the factor of logsumexp**2 in the loss
    ignore_index     the label of rows without loss and gradient
    weights          (n,), the factor of each row's gradient; None: 1
    with_gradients   False leaves the logits as they are
    """

    bias: Tensor | None = None
    softcap: float | None = None
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    ignore_index: int = -100
    weights: Tensor | None = None
    with_gradients: bool = True


PLAIN = Softmax()


def cross_entropy_(logits: Tensor, labels: Tensor, options: Softmax = PLAIN) -> Tensor:
    """The loss of each row of logits (n, V) in float32, (n,); the logits become its gradient times the weights.

    The gradient is that of the logits before bias and softcap. An ignored row gives 0 and zeros, any other label outside
    the vocabulary NaN. Without gradients the logits stay as they are.
    """
    # the interpreter truncates float32 to bf16 where a GPU rounds: there torch rounds
    rounds = options.with_gradients and triton.knobs.runtime.interpret and logits.dtype != torch.float32
    out = logits.float() if rounds else logits
    launch, losses = softmax_launch(logits, labels, out, options)
    with torch.cuda.device_of(logits):  # Triton launches on the current device, which may be another
        launch.kernel[launch.grid](*launch.args, **launch.options)
    if rounds:
        logits.copy_(out)
    return losses


def softmax_launch(logits: Tensor, labels: Tensor, out: Tensor, options: Softmax) -> tuple[Launch, Tensor]:
    """The launch of the kernel, and the losses (n,) that it fills; gradients go to `out` (n, V), which may be the logits."""
    n, V = logits.shape
    losses = torch.empty(n, dtype=torch.float32, device=logits.device)
    # weights may be one number, expanded; the kernel knows no strides but those of rows
    bias, weights = (None if x is None else x.contiguous() for x in (options.bias, options.weights))
    tensors = (logits, labels.contiguous(), bias, weights, losses, out)
    scalars = (options.softcap, options.label_smoothing or None, options.z_loss, options.ignore_index)
    block = min(BLOCK_V, triton.next_power_of_2(V))
    args = (*tensors, logits.stride(0), out.stride(0), V, *scalars, options.with_gradients, block)
    return Launch(
        "softmax", softmax_loss, (n,), args, {"num_warps": 8, "num_stages": 2, "enable_fp_fusion": True}
    ), losses


@triton.jit(do_not_specialize=["ignore_index"])
def softmax_loss(
    LOGITS, LABELS, BIAS, WEIGHTS, LOSSES, OUT,
    stride, out_stride, V, softcap, label_smoothing, z_loss, ignore_index,
    GRADIENTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The loss of one row and the gradient of its logits, by one program; softcap and label_smoothing may be None.

    The first pass over the row gives its log-sum-exp, the second writes (1 + 2 z_loss logsumexp) p - q over the logits.
    """
    n = tl.program_id(0).to(tl.int64)  # n * V may pass 2^31
    row, out = LOGITS + n * stride, OUT + n * out_stride
    # the label's own logit
    label = tl.load(LABELS + n)
    seen = label != ignore_index
    known = (label >= 0) & (label < V)
    goal, _ = _logit(row, BIAS, label, known, float("nan"), softcap)  # before the gradient overwrites it
    logsumexp, mean = _statistics(row, BIAS, V, softcap, label_smoothing is not None, BLOCK)
    loss = logsumexp + z_loss * logsumexp * logsumexp
    # the smoothed target: `on` more at the label, `off` everywhere
    on = 1.0
    off = 0.0
    if label_smoothing is not None:
        on = 1.0 - label_smoothing
        off = label_smoothing / V
        loss -= label_smoothing * mean
    tl.store(LOSSES + n, tl.where(seen, loss - on * goal, 0.0))
    if GRADIENTS:
        weight = 1.0 if WEIGHTS is None else tl.load(WEIGHTS + n).to(tl.float32)
        slope = weight * (1.0 + 2.0 * z_loss * logsumexp)
        for start in range(0, V, BLOCK):
            word = start + tl.arange(0, BLOCK)
            logit, ratio = _logit(row, BIAS, word, word < V, float("-inf"), softcap)
            gradient = slope * tl.exp2((logit - logsumexp) * LOG2E) - weight * (tl.where(word == label, on, 0.0) + off)
            if softcap is not None:
                gradient *= 1.0 - ratio * ratio
            gradient = tl.where(seen, gradient, 0.0)
            tl.store(out + word, gradient.to(OUT.dtype.element_ty), mask=word < V)


@triton.jit
def _statistics(row, BIAS, V, softcap, MEAN: tl.constexpr, BLOCK: tl.constexpr):
    """The log-sum-exp of a row and, with MEAN, its mean, in one pass.

    Each lane of the block keeps a sum of its own to the end; only the peak is one number, so that a step has one reduction.
    """
    peak = tl.full([], float("-inf"), tl.float32)
    parts = tl.zeros([BLOCK], tl.float32)
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        word = start + tl.arange(0, BLOCK)
        logit, _ = _logit(row, BIAS, word, word < V, float("-inf"), softcap)
        if MEAN:
            sums += tl.where(word < V, logit, 0.0)
        new_peak = tl.maximum(peak, tl.max(logit, 0))
        safe = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # a bias of -inf may hide all words so far
        parts = parts * tl.exp2((peak - safe) * LOG2E) + tl.exp2((logit - safe) * LOG2E)
        peak = new_peak
    return peak + tl.log2(tl.sum(parts, 0)) * LN2, tl.sum(sums, 0) / V


@triton.jit
def _logit(row, BIAS, word, mask, other, softcap):
    """Logits of some words in float32, with bias and softcap, `other` outside the mask; and the cap's tanh, for its slope."""
    logit = tl.load(row + word, mask=mask, other=0.0).to(tl.float32)
    if BIAS is not None:
        logit += tl.load(BIAS + word, mask=mask, other=0.0).to(tl.float32)
    ratio = logit
    if softcap is not None:
        ratio = 1.0 - 2.0 / (tl.exp2(logit * (2.0 * LOG2E / softcap)) + 1.0)
        logit = ratio * softcap
    return tl.where(mask, logit, other), ratio
