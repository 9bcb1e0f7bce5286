"""Losses of the sources of a mixture: sums over the rows of each, beside the sums over all."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

LOSSES, TARGETS = "losses_by_source", "targets_by_source"  # sums of a batch or a step, (K,)
NLLS, TOKENS = "nlls_by_source", "tokens_by_source"  # the same of a likelihood term, whose mean is over tokens
Metrics = dict[str, Tensor]


def sums_by_source(n_sources: int, sources: Tensor, losses: Tensor, targets: Tensor) -> Metrics:
    """Sums by source (K,) of losses (N,) and of their targets (N,), from source numbers (N,)."""
    zeros = losses.new_zeros(n_sources, dtype=torch.float32)
    return {
        LOSSES: zeros.index_add(0, sources, losses.detach().float()),
        TARGETS: zeros.index_add(0, sources, targets.float()),
    }


def sums_of_rows(n_sources: int, sources: Tensor, loss: Callable[[Tensor], Tensor]) -> Metrics:
    """Sums by source of a loss that adds up over rows, each a target; none without a mixture.

    sources: (B,). loss: function of a mask (B,) that returns the sum over the rows where it is True.
    """
    with torch.no_grad():
        losses = torch.stack([loss(sources == k) for k in range(n_sources)])
    numbers = torch.arange(n_sources, device=sources.device)
    return sums_by_source(n_sources, numbers, losses, sources.bincount(minlength=n_sources))


def take_losses(names: Sequence[str], sums: Metrics) -> Metrics:
    """The loss of each source that has targets, by name; its sums are taken out."""
    if LOSSES not in sums:
        return {}
    targets = sums.pop(TARGETS)
    means = sums.pop(LOSSES) / targets
    if NLLS in sums:
        means = means + sums.pop(NLLS) / sums.pop(TOKENS).clamp(min=1)
    return {f"loss/{name}": mean for name, mean, count in zip(names, means, targets, strict=True) if count > 0}
