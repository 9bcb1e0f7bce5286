"""Distillation of a linear layer's predictions, whose gradients are made in the forward pass, chunk by chunk.

Two vocabularies' worth of logits for each token, the student's and the teacher's, exist for a chunk of tokens at a time.
A teacher is a function that gives the log-probabilities of a chunk: of all words, of its likeliest ones with the rest
of the vocabulary as one further outcome, whose probability is exact, or of the words of another vocabulary.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from genai_pl.kernels.chunked_logits import Projection, Rows, chunks, matmul_dtype
from genai_pl.kernels.uncompiled import uncompiled


class TeacherLogprobs(NamedTuple):
    """Log-probabilities of n tokens: logprobs (n, V), ids None; or (n, K + 1) of the words ids (n, K) and of all others.

    ranked: of the words of another vocabulary, which are compared with the student's by rank.
    """

    logprobs: Tensor
    ids: Tensor | None = None
    ranked: bool = False


Teacher = Callable[[Rows], TeacherLogprobs]  # of the tokens of a chunk, at the temperature of the loss


class Weights(NamedTuple):
    """The weights (N,) of tokens in the loss: of their cross entropy, and of their divergence."""

    cross_entropy: Tensor
    divergence: Tensor


class _Options(NamedTuple):
    """The arguments of `linear_distillation` that need no gradient."""

    teacher: Teacher
    weights: Weights
    beta: float
    temperature: float
    softcap: float | None
    ignore_index: int
    chunk_tokens: int | None
    with_gradients: bool


def generalized_jsd(teacher: Tensor, student: Tensor, *, beta: float) -> tuple[Tensor, Tensor]:
    """beta KL(P || M) + (1 - beta) KL(Q || M) with M = beta P + (1 - beta) Q, (n,) (Agarwal et al. 2024, eq. 1).

    teacher and student are log-probabilities (n, J) of P and Q. beta=0 is KL(P || Q) and beta=1 KL(Q || P), the limits of
    the sum over beta and over 1 - beta. Also Q times the derivative by Q, up to a multiple of Q, (n, J): what the gradient
    of logits is made of.
    """
    P, Q = teacher.exp(), student.exp()
    if beta == 0:
        return (P * (teacher - student)).sum(-1), -P
    if beta == 1:
        slopes = Q * (student - teacher)
        return slopes.sum(-1), slopes
    b = teacher.new_tensor(beta)
    mixture = torch.logaddexp(teacher + b.log(), student + torch.log1p(-b))
    slopes = (1 - beta) * Q * (student - mixture)
    return beta * (P * (teacher - mixture)).sum(-1) + slopes.sum(-1), slopes


def universal_logit_distance(teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
    """sum_i |p_i - q_i| of probabilities sorted from the largest down, (n,) (Boizard et al. 2024, eq. 3), and its slopes.

    teacher (n, V') and student (n, V) are log-probabilities; the words that the smaller vocabulary lacks have probability 0.
    The slopes are q times the derivative by q, (n, V), in the order of the student's words.
    """
    P = teacher.exp().sort(dim=-1, descending=True).values
    Q, order = student.exp().sort(dim=-1, descending=True)
    V = Q.shape[-1]
    gaps = Q - F.pad(P[:, :V], (0, max(0, V - P.shape[-1])))  # (n, V)
    distance = gaps.abs().sum(-1) + P[:, V:].sum(-1)
    return distance, torch.empty_like(Q).scatter_(-1, order, Q * gaps.sign())


def top_logprobs(logprobs: Tensor, k: int) -> TeacherLogprobs:
    """The k likeliest words of log-probabilities (n, V), and the log of the probability of all others."""
    top, ids = logprobs.topk(k, dim=-1)
    others = logprobs.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    return TeacherLogprobs(torch.cat([top, others], dim=-1), ids)


def linear_teacher(
    hidden: Tensor, weight: Tensor, *, temperature: float, bias: Tensor | None = None, softcap: float | None = None
) -> Teacher:
    """The teacher of hidden states (N, C) and a head weight (V, C), bias (V,): log-softmax of its logits / temperature."""
    dtype = matmul_dtype(hidden)
    head = weight.to(dtype)

    def teacher(rows: Rows) -> TeacherLogprobs:
        logits = (hidden[rows].to(dtype) @ head.t()).to(torch.promote_types(dtype, torch.float32))  # (n, V)
        if bias is not None:
            logits = logits + bias
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        return TeacherLogprobs((logits / temperature).log_softmax(-1))

    return teacher


@uncompiled("its loop over chunks is as fast in eager mode, and its length depends on the labels")
def linear_distillation(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    teacher: Teacher,
    weights: Weights,
    *,
    beta: float,
    temperature: float,
    bias: Tensor | None = None,
    softcap: float | None = None,
    ignore_index: int = -100,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum over labelled tokens of w_c cross entropy + w_d temperature^2 divergence, and both of each token (2, N), detached.

    hidden is (N, C), weight (V, C), bias (V,), labels (N,); the divergence is `generalized_jsd` of the softmax of logits /
    temperature, or `universal_logit_distance` where the teacher's words are ranked. temperature^2 keeps its gradient as large
    as that of the cross entropy (Hinton et al. 2015, 2).
    Backward runs once, as that of `linear_cross_entropy`.
    """
    with_gradients = torch.is_grad_enabled()
    options = _Options(teacher, weights, beta, temperature, softcap, ignore_index, chunk_tokens, with_gradients)
    return _LinearDistillation.apply(hidden, weight, bias, labels, options)


class _LinearDistillation(torch.autograd.Function):
    """The sum, with gradients of hidden (N, C), weight (V, C) and bias (V,) made on the way."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, options: _Options
    ) -> tuple[Tensor, Tensor]:
        dtype = matmul_dtype(hidden)
        projection = Projection(hidden, weight, bias, softcap=options.softcap, matmul_dtype=dtype, may_fuse=False)
        if options.with_gradients:
            projection.track(ctx.needs_input_grad)
        # chunk by chunk: logits of both, losses and the student's gradient in place, gradients of the inputs
        losses = hidden.new_zeros(2, len(labels), dtype=projection.dtype)
        for rows in chunks(
            labels,
            vocab_size=len(weight),
            ignore_index=options.ignore_index,
            chunk_tokens=options.chunk_tokens,
            dtype=dtype,
        ):
            logits, taught = projection.logits(rows), options.teacher(rows)
            goals, weights = labels[rows], Weights(*(w[rows] for w in options.weights))
            parts = []
            for part, block in projection.float_blocks(logits):
                ids = None if taught.ids is None else taught.ids[part]
                of_block = TeacherLogprobs(taught.logprobs[part], ids, taught.ranked)
                w = Weights(weights.cross_entropy[part], weights.divergence[part])
                parts.append(_losses_(block, goals[part], of_block, w, options, tracks=projection.tracks))
            losses[:, rows] = torch.cat(parts, dim=1)
            if projection.tracks:
                projection.add_gradients(rows, logits)
        ctx.gradients = projection.gradients()
        ctx.mark_non_differentiable(losses)
        total = (torch.stack([*options.weights]) * losses * losses.new_tensor([[1.0], [options.temperature**2]])).sum()
        return total, losses

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, d_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("linear_distillation gives its gradients once: call it again for a second backward")
        return *(None if gradient is None else gradient.mul_(d_total) for gradient in gradients), None, None


def _losses_(
    logits: Tensor, labels: Tensor, teacher: TeacherLogprobs, weights: Weights, options: _Options, *, tracks: bool
) -> Tensor:
    """Cross entropy and divergence (2, n) of some tokens; their logits (n, V) become the gradient of the weighted sum."""
    rows, T = torch.arange(len(labels), device=labels.device), options.temperature
    # cross entropy, at temperature 1
    logprobs = logits.log_softmax(-1)
    cross_entropy = -logprobs[rows, labels]
    # divergence of outcomes: all words, or the teacher's likeliest and the others together
    student = logprobs if T == 1 else (logits / T).log_softmax(-1)  # (n, V)
    ids = teacher.ids
    outcomes = student
    if ids is not None:
        others = student.scatter(1, ids, -torch.inf)  # (n, V)
        others_logprob = others.logsumexp(1, keepdim=True)
        outcomes = torch.cat([student.gather(1, ids), others_logprob], dim=1)  # (n, K + 1)
    if teacher.ranked:
        divergence, slopes = universal_logit_distance(teacher.logprobs.to(outcomes), outcomes)
    else:
        divergence, slopes = generalized_jsd(teacher.logprobs.to(outcomes), outcomes, beta=options.beta)
    if tracks:
        # the chain rule of the softmax: slopes, spread over the words of their outcome, minus Q times their sum
        gradient = slopes
        if ids is not None:
            gradient = (others - others_logprob).exp().mul_(slopes[:, -1:]).scatter_(1, ids, slopes[:, :-1])
        gradient = torch.addcmul(gradient, student.exp(), slopes.sum(1, keepdim=True), value=-1)
        logits.copy_(gradient.mul_(T * weights.divergence[:, None]))
        logits.add_(logprobs.exp_().mul_(weights.cross_entropy[:, None]))
        logits[rows, labels] -= weights.cross_entropy
    return torch.stack([cross_entropy, divergence])
