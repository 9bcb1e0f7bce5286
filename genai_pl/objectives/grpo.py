"""Group-relative policy optimization: completions are compared with others of the same prompt, without a value model.

Tensors are (B, T) and aligned with labels, as in `ppo`; rewards and advantages are (B,), the completions of a prompt
next to each other.
"""

from typing import Literal

import torch
from torch import Tensor

from genai_pl.errors import ConfigError
from genai_pl.objectives.ppo import clipped_surrogate, kl_estimate

EPSILON = 1e-4  # rewards of 0 and 1 differ by far more, or not at all


@torch.no_grad()
def group_advantages(rewards: Tensor, group_size: int, *, scale: Literal["std", "none"] = "std") -> Tensor:
    """Rewards minus the mean of their group, over its standard deviation (Shao et al. 2024, 4.1.2).

    scale="none" leaves the deviation out, which weighs every prompt alike (Liu et al. 2025). A reward that is not a
    number is not in its group's mean, and has no advantage.

    >>> group_advantages(torch.tensor([1.0, 0.0, 0.0, 0.0]), 4, scale="none").tolist()
    [0.75, -0.25, -0.25, -0.25]
    """
    if scale not in ("std", "none"):
        raise ConfigError(f"advantages cannot be scaled by {scale!r}; choose std or none")
    groups, known, n = _groups(rewards, group_size)
    advantages = torch.where(known, groups - groups.sum(1, keepdim=True) / n.clamp(min=1), 0)
    if scale == "std":
        variance = advantages.square().sum(1, keepdim=True) / (n - 1).clamp(min=1)
        advantages = advantages / (variance.sqrt() + EPSILON)
    return advantages.flatten()


@torch.no_grad()
def rloo_advantages(rewards: Tensor, group_size: int) -> Tensor:
    """Rewards minus the mean of the others in their group (Ahmadian et al. 2024).

    >>> rloo_advantages(torch.tensor([1.0, 0.0, 0.0]), 3).tolist()
    [1.0, -0.5, -0.5]
    """
    groups, known, n = _groups(rewards, group_size)
    others = (groups.sum(1, keepdim=True) - groups) / (n - 1).clamp(min=1)
    return torch.where(known & (n > 1), groups - others, 0).flatten()


def _groups(rewards: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards of each prompt in a row (N / group_size, group_size), as differences to its first number; which of them are
    numbers (others are 0 there); and how many of each group.

    Only differences count, and differences of equal rewards have a mean without rounding error, which EPSILON would amplify.
    """
    if group_size < 2:
        raise ConfigError(f"a group must have at least 2 completions to compare, not {group_size}")
    groups = rewards.view(-1, group_size)
    known = ~groups.isnan()
    first = groups.gather(1, known.int().argmax(1, keepdim=True))
    return torch.where(known, groups - first, 0), known, known.sum(1, keepdim=True)


def completion_weights(
    mask: Tensor, *, normalization: Literal["sequence", "token", "constant"], length: int | None = None
) -> tuple[Tensor, Tensor]:
    """The weight of each token (B, T), and the number by which the sum over all batches is divided.

    sequence: the mean over completions of their means (Shao et al. 2024, eq. 3); token: the mean over all tokens (Yu et
    al. 2025, eq. 12); constant: every sum over `length`, the maximum of a completion (Liu et al. 2025).
    """
    B, ones = mask.shape[0], mask.float()
    if normalization == "sequence":
        return ones / ones.sum(-1, keepdim=True).clamp(min=1), ones.new_tensor(B)
    if normalization == "token":
        return ones, ones.sum()
    if normalization == "constant" and length is not None:
        return ones / length, ones.new_tensor(B)
    raise ConfigError(
        f"there is no normalization {normalization!r}; choose sequence, token or constant (with a length)"
    )


def grpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    *,
    clip_range: float,
    clip_range_high: float | None = None,
    reference_logprobs: Tensor | None = None,
    beta: float = 0.0,
) -> Tensor:
    """The clipped surrogate plus beta KL(policy || reference) by k3, summed with weights (Shao et al. 2024, eq. 3 and 4).

    advantages are (B,); weights come from `completion_weights`, and a token of weight 0 counts nowhere.
    """
    mask = weights > 0
    losses = clipped_surrogate(
        logprobs, old_logprobs, advantages[:, None], mask, clip_range=clip_range, clip_range_high=clip_range_high
    )
    if reference_logprobs is not None:
        log_ratio = torch.where(mask, logprobs - reference_logprobs, 0)
        losses = losses + beta * kl_estimate(log_ratio, torch.zeros_like(log_ratio), "k3")
    return (weights * losses).sum()
