"""Proximal policy optimization on tokens: the state is the text so far, the action the next token.

Everything is (B, T) and aligned with labels: position t has the value before its label is chosen, the log-probability
of that label and its reward. The mask is True where the label is a token of a completion; prompts, padding and turns of
others count nowhere.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from genai_pl.errors import ConfigError
from genai_pl.kernels.chunked_logits import chunks, matmul_dtype, tokens_at_once
from genai_pl.kernels.uncompiled import uncompiled
from genai_pl.objectives.token_loss import IGNORED


def kl_estimate(logprobs: Tensor, reference_logprobs: Tensor, kind: Literal["k1", "k2", "k3"] = "k1") -> Tensor:
    """An estimate of KL(policy || reference) for each token that the policy drew (Schulman 2020).

    k1 is unbiased, k2 has little variance and a bias, k3 is unbiased, has little variance and is never negative.
    """
    log_ratio = logprobs - reference_logprobs
    if kind == "k1":
        return log_ratio
    if kind == "k2":
        return log_ratio.square() / 2
    if kind == "k3":
        return torch.expm1(-log_ratio) + log_ratio
    raise ConfigError(f"there is no KL estimator {kind!r}; choose k1, k2 or k3")


def kl_rewards(
    scores: Tensor, kl: Tensor, mask: Tensor, *, kl_coef: float, turn_rewards: Tensor | None = None
) -> Tensor:
    """-kl_coef kl for each token, and the score (B,) of the completion at its last one (Ziegler et al. 2019, eq. 2).

    turn_rewards (B, T): parts of the score that were given for earlier tokens, and stay there.

    >>> mask = torch.tensor([[True, True, False]])
    >>> kl_rewards(torch.tensor([1.0]), torch.tensor([[0.5, 0.25, 9.0]]), mask, kl_coef=0.5).tolist()
    [[-0.25, 0.875, 0.0]]
    """
    is_last = mask & (mask.flip(-1).cumsum(-1).flip(-1) == 1)
    rewards = torch.where(mask, -kl_coef * kl, 0)
    if turn_rewards is not None:
        rewards, scores = rewards + turn_rewards, scores - turn_rewards.sum(1)
    return rewards + torch.where(is_last, scores[:, None], 0)


def adapt_kl_coef(kl_coef: float, kl: float, *, target: float, horizon: float, n_steps: int) -> float:
    """The coefficient after n_steps samples of divergence kl, drawn towards the target (Ziegler et al. 2019, 2.2).

    >>> round(adapt_kl_coef(0.2, 12.0, target=6.0, horizon=100, n_steps=50), 3)
    0.22
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * n_steps / horizon)


@torch.no_grad()
def gae(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, gae_lambda: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates and returns, 0 outside the mask (Schulman et al. 2016, eq. 16).

    Positions outside the mask take no time step, and the value after the last token is 0.

    >>> rewards, values, mask = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.5]]), torch.ones(1, 2, dtype=torch.bool)
    >>> [x.tolist() for x in gae(rewards, values, mask, gamma=1.0, gae_lambda=1.0)]
    [[[0.5, 0.5]], [[1.0, 1.0]]]
    """
    advantages = torch.zeros_like(values)
    next_value, next_advantage = values.new_zeros(len(values)), values.new_zeros(len(values))
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * gae_lambda * next_advantage
        advantages[:, t] = torch.where(mask[:, t], advantage, 0)
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        next_advantage = torch.where(mask[:, t], advantage, next_advantage)
    return advantages, torch.where(mask, advantages + values, 0)


def moment_sums(values: Tensor, mask: Tensor) -> Tensor:
    """The number of masked values, their sum and their sum of squares, (3,): ranks add these up for `whiten`."""
    masked = torch.where(mask, values, 0).double()  # the variance is a difference of these
    return torch.stack([mask.sum().double(), masked.sum(), masked.square().sum()])


def moments(sums: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance, in float64, from the `moment_sums` of values."""
    count, total, squares = sums
    mean = total / count.clamp(min=1)
    return mean, ((squares - count * mean.square()) / (count - 1).clamp(min=1)).clamp(min=0)


def whiten(values: Tensor, mask: Tensor, *, sums: Tensor | None = None) -> Tensor:
    """Masked values shifted to mean 0 and scaled to variance 1, and 0 elsewhere; `sums` are those of all ranks."""
    mean, variance = moments(moment_sums(values, mask) if sums is None else sums)
    whitened = (values - mean) * (variance + 1e-8).rsqrt()
    return torch.where(mask, whitened, 0)


def ratio_ceiling(clip_range: float, clip_range_high: float | None) -> float:
    """The largest ratio that is not clipped: clip_range stands in for a clip_range_high of None."""
    return 1 + (clip_range if clip_range_high is None else clip_range_high)


def is_clipped(ratio: Tensor, advantages: Tensor, *, clip_range: float, clip_range_high: float | None) -> Tensor:
    """Which ratios lose their gradient by clipping: above the ceiling with a positive advantage, below with a negative one."""
    high = ratio_ceiling(clip_range, clip_range_high)
    return torch.where(advantages > 0, ratio > high, (ratio < 1 - clip_range) & (advantages < 0))


def clipped_surrogate(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_range: float,
    clip_range_high: float | None = None,
) -> Tensor:
    """-min(ratio A, clip(ratio) A) for each token, 0 outside the mask (Schulman et al. 2017, eq. 7).

    With clip_range_high the ratio may rise further than it may fall (Yu et al. 2025, eq. 10).
    """
    ratio = token_ratio(logprobs, old_logprobs, mask)
    clipped = ratio.clamp(1 - clip_range, ratio_ceiling(clip_range, clip_range_high))
    return torch.where(mask, -torch.minimum(ratio * advantages, clipped * advantages), 0)


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, *, clip_range: float
) -> Tensor:
    """The clipped surrogate summed over tokens."""
    return clipped_surrogate(logprobs, old_logprobs, advantages, mask, clip_range=clip_range).sum()


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, clip_range: float) -> Tensor:
    """Half the squared error summed over tokens: of the value or of its clip to old_values +- clip_range, if that is worse."""
    clipped = old_values + (values - old_values).clamp(-clip_range, clip_range)
    errors = torch.maximum((values - returns).square(), (clipped - returns).square())
    return torch.where(mask, errors, 0).sum() / 2


@torch.no_grad()
def policy_metrics(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Sums over tokens: KL(old || new) by k3, and the ratio. Clipped tokens are `grpo.clipped_tokens`, for every surrogate."""
    return {
        "policy/approxkl": torch.where(mask, kl_estimate(old_logprobs, logprobs, "k3"), 0).sum(),
        "policy/ratio": torch.where(mask, token_ratio(logprobs, old_logprobs, mask), 0).sum(),
    }


def token_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """New over old probability of each token, 1 outside the mask."""
    # masked before exp: an overflow outside the mask would turn a gradient of 0 into NaN
    return torch.where(mask, logprobs - old_logprobs, 0).exp()


@uncompiled("its loop over chunks depends on the labels, as that of linear_cross_entropy does")
def token_entropy(
    hidden: Tensor, head: Tensor, labels: Tensor, *, bias: Tensor | None = None, softcap: float | None = None
) -> Tensor:
    """Entropy in nats of the prediction at each labelled position, 0 elsewhere: hidden (..., C), head (V, C), labels (...).

    The logits exist for a chunk of tokens at a time, and are recomputed in the backward pass.
    """
    flat, dtype = hidden.reshape(-1, hidden.shape[-1]), matmul_dtype(hidden)  # (N, C)
    entropy = flat.new_zeros(len(flat), dtype=torch.promote_types(dtype, torch.float32))
    size = max(1, tokens_at_once(len(head), labels.device, dtype) // 4)  # four tensors of (n, V) exist at once
    for rows in chunks(labels.reshape(-1), vocab_size=len(head), ignore_index=IGNORED, chunk_tokens=size):
        part = (flat[rows], head, bias, softcap, dtype)
        entropy[rows] = checkpoint(_entropy, *part, use_reentrant=False, preserve_rng_state=False)
    return entropy.view(labels.shape)


def _entropy(hidden: Tensor, head: Tensor, bias: Tensor | None, softcap: float | None, dtype: torch.dtype) -> Tensor:
    """The entropy (n,) of the predictions of hidden (n, C)."""
    logits = (hidden.to(dtype) @ head.to(dtype).t()).to(torch.promote_types(dtype, torch.float32))  # (n, V)
    if bias is not None:
        logits = logits + bias
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logprobs = logits.log_softmax(-1)
    return -(logprobs.exp() * logprobs).sum(-1)
