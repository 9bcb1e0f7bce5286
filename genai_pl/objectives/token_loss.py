"""Token loss: cross entropy and accuracy over labelled tokens, without materialized logits."""

import torch
from torch import Tensor

from genai_pl.kernels import GroupSums, linear_cross_entropy
from genai_pl.kernels.chunked_logits import chunks, matmul_dtype
from genai_pl.kernels.uncompiled import uncompiled
from genai_pl.kernels.vocab_parallel import local_vocab_shard

IGNORED = -100


def token_loss(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    by_group: GroupSums | None = None,
) -> Tensor:
    """-sum_t log P(labels[t]) in nats over the labelled tokens of hidden (..., C), head (V, C) and labels (...).

    z_loss adds z (log Z)^2 (Chowdhery et al. 2022, 5). by_group receives the same sums by group of tokens.
    """
    return linear_cross_entropy(
        hidden,
        head,
        labels,
        bias=bias,
        softcap=softcap,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        ignore_index=IGNORED,
        by_group=by_group,
    )


@uncompiled("its loop over chunks depends on the labels, as that of linear_cross_entropy does")
@torch.no_grad()
def masked_accuracy(hidden: Tensor, head: Tensor, labels: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """The number of labelled tokens whose logit is the highest of their position; a softcap does not change which that is."""
    hidden, labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)  # (N, C), (N,)
    dtype = matmul_dtype(hidden)
    head, bias, part = local_vocab_shard(head.to(dtype), bias)
    vocab_size = head.shape[0] if part is None else part.shard_size
    correct = labels.new_zeros(())
    for rows in chunks(labels, vocab_size=vocab_size, ignore_index=IGNORED, chunk_tokens=None, dtype=dtype):
        logits = hidden[rows].to(dtype) @ head.t()  # (n, V)
        if bias is not None:
            logits = logits + bias
        best = logits.argmax(-1) if part is None else part.argmax(logits)
        correct += (best == labels[rows]).sum()
    return correct
