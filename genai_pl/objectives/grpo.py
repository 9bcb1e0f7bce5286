"""Policy gradients without a value model: completions are compared with others of the same prompt or of the batch.

Tensors are (B, T) and aligned with labels, as in `ppo`; rewards are (B,), the completions of a prompt next to each
other. An objective is an advantage, a surrogate of the policy gradient, and a normalization over tokens: each a function
here, so that GRPO, Dr. GRPO, DAPO, GSPO, CISPO, RLOO and REINFORCE++ are combinations.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from genai_pl.errors import ConfigError
from genai_pl.objectives.ppo import (
    clipped_surrogate,
    is_clipped,
    kl_estimate,
    kl_rewards,
    moment_sums,
    moments,
    ratio_ceiling,
    token_ratio,
)

EPSILON = 1e-4  # rewards of 0 and 1 differ by far more, or not at all


@torch.no_grad()
def group_advantages(
    rewards: Tensor, group_size: int, *, scale: Literal["std", "batch", "none"] = "std", sums: Tensor | None = None
) -> Tensor:
    """Rewards minus the mean of their group, over its standard deviation (Shao et al. 2024, 4.1.2).

    scale="batch" divides by the deviation of all rewards of the batch (Liu et al. 2025, Tricks or Traps, 4.2), which
    `sums`, the `moment_sums` of all ranks, give; scale="none" by nothing, which weighs every prompt alike (Liu et al.
    2025, Dr. GRPO). A reward that is not a number is in no mean, and has no advantage.

    >>> group_advantages(torch.tensor([1.0, 0.0, 0.0, 0.0]), 4, scale="none").tolist()
    [0.75, -0.25, -0.25, -0.25]
    """
    if scale not in ("std", "batch", "none"):
        raise ConfigError(f"advantages cannot be scaled by {scale!r}; choose std, batch or none")
    groups, known, n = _groups(rewards, group_size)
    advantages = torch.where(known, groups - groups.sum(1, keepdim=True) / n.clamp(min=1), 0)
    if scale == "std":
        variance = advantages.square().sum(1, keepdim=True) / (n - 1).clamp(min=1)
        advantages = advantages / (variance.sqrt() + EPSILON)
    elif scale == "batch":
        _, variance = moments(moment_sums(rewards, ~rewards.isnan()) if sums is None else sums)
        advantages = advantages / (variance.sqrt() + EPSILON).to(advantages)
    return advantages.flatten()


@torch.no_grad()
def process_advantages(
    rewards: Tensor, ends: Tensor, group_size: int, *, scale: Literal["std", "none"] = "std"
) -> Tensor:
    """Advantages (B, T) of tokens from rewards of steps (B, T), which count where `ends` (B, T) is True.

    Every reward is normalized by the mean and the deviation of all steps of its group, and a token's advantage is the sum of
    those of the steps that end at it or later (process supervision: Shao et al. 2024, 4.1.3); scale="none" only centers them.

    >>> ends = torch.tensor([[True, True], [False, True]])
    >>> process_advantages(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), ends, 2, scale="none").tolist()
    [[-1.0, -1.0], [1.0, 1.0]]
    """
    if scale not in ("std", "none"):
        raise ConfigError(
            f"objective.scale={scale}: advantages of steps are scaled by std or none; choose one of these"
        )
    steps, known = (x.reshape(-1, group_size * x.shape[1]) for x in (rewards, ends))
    # differences to the first step: those of equal rewards have a mean without rounding error
    first = steps.gather(1, known.int().argmax(1, keepdim=True))
    steps, n = torch.where(known, steps - first, 0), known.sum(1, keepdim=True)
    centered = torch.where(known, steps - steps.sum(1, keepdim=True) / n.clamp(min=1), 0)
    if scale == "std":
        variance = centered.square().sum(1, keepdim=True) / (n - 1).clamp(min=1)
        centered = centered / (variance.sqrt() + EPSILON)
    return centered.view_as(rewards).flip(-1).cumsum(-1).flip(-1)


@torch.no_grad()
def rloo_advantages(rewards: Tensor, group_size: int) -> Tensor:
    """Rewards minus the mean of the others in their group (Ahmadian et al. 2024).

    >>> rloo_advantages(torch.tensor([1.0, 0.0, 0.0]), 3).tolist()
    [1.0, -0.5, -0.5]
    """
    groups, known, n = _groups(rewards, group_size)
    others = (groups.sum(1, keepdim=True) - groups) / (n - 1).clamp(min=1)
    return torch.where(known & (n > 1), groups - others, 0).flatten()


@torch.no_grad()
def reinforce_returns(rewards: Tensor, kl: Tensor, mask: Tensor, *, beta: float) -> Tensor:
    """The reward minus beta times the KL of this and all later tokens, (B, T), 0 outside the mask (Hu et al. 2025, eq. 8).

    REINFORCE++ whitens them over all tokens of the batch (eq. 10: `ppo.whiten`). A completion whose reward is not a
    number must have an empty mask.

    >>> mask = torch.tensor([[True, True, False]])
    >>> reinforce_returns(torch.tensor([1.0]), torch.tensor([[0.5, 0.25, 9.0]]), mask, beta=1.0).tolist()
    [[0.25, 0.75, 0.0]]
    """
    token_rewards = kl_rewards(rewards.nan_to_num(), kl, mask, kl_coef=beta)
    return torch.where(mask, token_rewards.flip(-1).cumsum(-1).flip(-1), 0)


@torch.no_grad()
def equal_groups(rewards: Tensor, group_size: int) -> Tensor:
    """Which groups (B / group_size,) have one reward for all their completions: their advantages are 0, they teach nothing.

    >>> equal_groups(torch.tensor([1.0, 1.0, 0.0, 1.0, float("nan"), 0.5]), 2).tolist()
    [True, False, True]
    """
    groups, _, _ = _groups(rewards, group_size)
    return (groups == 0).all(1)


@torch.no_grad()
def overlong_penalty(lengths: Tensor, *, longest: int, buffer: int) -> Tensor:
    """0 for completions shorter than longest - buffer tokens, from there down to -1 at `longest` (Yu et al. 2025, eq. 13).

    >>> overlong_penalty(torch.tensor([10, 85, 90, 100]), longest=100, buffer=20).tolist()
    [0.0, -0.25, -0.5, -1.0]
    """
    return ((longest - buffer - lengths) / buffer).clamp(-1, 0)


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


def sequence_log_ratio(
    logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, *, reduction: Literal["mean", "sum"] = "mean"
) -> Tensor:
    """The log-ratio new / old of whole completions, (B, 1): the mean over tokens (Zheng et al. 2025, eq. 7) or their sum."""
    total = torch.where(mask, logprobs - old_logprobs, 0).sum(-1, keepdim=True)
    return total if reduction == "sum" else total / mask.sum(-1, keepdim=True).clamp(min=1)


def sequence_surrogate(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, *, clip_range: float, **clip: float | None
) -> Tensor:
    """The clipped surrogate of the geometric mean of a completion's ratios, at each of its tokens (GSPO: Zheng et al. 2025,
    eq. 5)."""
    log_ratio = sequence_log_ratio(logprobs, old_logprobs, mask).expand_as(logprobs)
    return clipped_surrogate(log_ratio, torch.zeros_like(log_ratio), advantages, mask, clip_range=clip_range, **clip)


def rloo_surrogate(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, *, clip_range: float, **clip: float | None
) -> Tensor:
    """The clipped surrogate of the product of a completion's ratios, at each of its tokens: the whole completion is one
    action (RLOO: Ahmadian et al. 2024, 3.2)."""
    log_ratio = sequence_log_ratio(logprobs, old_logprobs, mask, reduction="sum").expand_as(logprobs)
    return clipped_surrogate(log_ratio, torch.zeros_like(log_ratio), advantages, mask, clip_range=clip_range, **clip)


def cispo_surrogate(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_range: float,
    clip_range_high: float | None = None,
) -> Tensor:
    """-min(ratio, 1 + clip_range_high) A log P of each token, without a gradient through the ratio (CISPO: MiniMax 2025, eq. 4).

    The ratio is a weight, bounded above alone, so that no token loses its gradient. clip_range stands in for a
    clip_range_high of None.
    """
    high = ratio_ceiling(clip_range, clip_range_high)
    weight = token_ratio(logprobs, old_logprobs, mask).detach().clamp(max=high)
    return -weight * advantages * torch.where(mask, logprobs, 0)


Surrogate = Callable[
    ..., Tensor
]  # (logprobs, old_logprobs, advantages, mask, *, clip_range, clip_range_high) -> (B, T)
SURROGATES: dict[str, Surrogate] = {
    "grpo": clipped_surrogate,
    "gspo": sequence_surrogate,
    "cispo": cispo_surrogate,
    "rloo": rloo_surrogate,
}


def grpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    *,
    clip_range: float,
    clip_range_high: float | None = None,
    surrogate: Surrogate = clipped_surrogate,
    reference_logprobs: Tensor | None = None,
    beta: float = 0.0,
    kl_estimator: Literal["k2", "k3"] = "k3",
) -> Tensor:
    """A surrogate plus beta KL(policy || reference), summed with weights (Shao et al. 2024, eq. 3 and 4).

    advantages are (B,) or (B, T); weights come from `completion_weights`, and a token of weight 0 counts nowhere.
    """
    mask, advantages = weights > 0, advantages[:, None] if advantages.dim() == 1 else advantages
    clip = {"clip_range": clip_range, "clip_range_high": clip_range_high}
    losses = surrogate(logprobs, old_logprobs, advantages, mask, **clip)
    if reference_logprobs is not None:
        log_ratio = torch.where(mask, logprobs - reference_logprobs, 0)
        losses = losses + beta * kl_estimate(log_ratio, torch.zeros_like(log_ratio), kl_estimator)
    return (weights * losses).sum()


@torch.no_grad()
def clipped_tokens(
    kind: str,
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_range: float,
    clip_range_high: float | None = None,
) -> Tensor:
    """How many tokens lose their gradient by the clipping of a surrogate, a key of SURROGATES ("grpo" is that of PPO too): of
    CISPO, where none does, those whose weight it bounds.
    """
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0)  # an overflow outside the mask is no ratio
    if kind in ("gspo", "rloo"):
        reduction = "mean" if kind == "gspo" else "sum"
        log_ratio = sequence_log_ratio(logprobs, old_logprobs, mask, reduction=reduction)
    ratio = log_ratio.exp()
    if kind == "cispo":
        return (mask & (ratio > ratio_ceiling(clip_range, clip_range_high))).sum()
    clipped = is_clipped(ratio, advantages, clip_range=clip_range, clip_range_high=clip_range_high)
    return (mask & clipped).sum()
