"""Preference losses without a reward model, on the log-probabilities of whole completions.

Every loss is a sum over the pairs (or samples) of the batch. Losses with a reference take margins (B,): log-probability
of the chosen completion minus that of the rejected one, under the policy and under the reference. Losses without one
take logprobs and lengths (B, 2): of the chosen completion in column 0 and of the rejected one in column 1.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from genai_pl.errors import ConfigError
from genai_pl.objectives.reward import reward_accuracy

WITH_REFERENCE = ("sigmoid", "ipo", "hinge", "robust")
WITHOUT_REFERENCE = ("orpo", "simpo", "cpo")


def sequence_logprobs(logprobs: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of the logprobs (B, T) where the mask is True, and the number of these positions: both (B,)."""
    return torch.where(mask, logprobs, 0).sum(-1), mask.sum(-1)


def segment_sums(values: Tensor, segment_ids: Tensor, n: int) -> Tensor:
    """Sums of the values (B, T) over segments 1 .. n of each row, (B, n); padding, segment 0, belongs to none.

    Added in one order, unlike with scatter_add on a GPU, so that a run repeats exactly.

    >>> segment_sums(torch.tensor([[1.0, 2.0, 4.0, 8.0]]), torch.tensor([[1, 1, 2, 0]]), 2).tolist()
    [[3.0, 4.0]]
    """
    return torch.where(_members(segment_ids, n), values[:, None], 0).sum(-1)


def segment_ends(segment_ids: Tensor, n: int) -> Tensor:
    """Position of the last token of segments 1 .. n of each row, (B, n); 0 for a segment that is not there.

    >>> segment_ends(torch.tensor([[1, 1, 2, 0]]), 2).tolist()
    [[1, 2]]
    """
    positions = torch.arange(segment_ids.shape[-1], device=segment_ids.device)
    return torch.where(_members(segment_ids, n), positions, 0).amax(-1)


def _members(segment_ids: Tensor, n: int) -> Tensor:
    """Whether each position belongs to segment 1 .. n, (B, n, T)."""
    numbers = torch.arange(1, n + 1, device=segment_ids.device)
    return segment_ids[:, None] == numbers[:, None]


def dpo_loss(policy_margin: Tensor, reference_margin: Tensor, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """-sum log sigmoid(beta (policy - reference margin)) (Rafailov et al. 2023, eq. 7).

    label_smoothing is the share of pairs whose labels are taken to be swapped (conservative DPO: Mitchell 2023).

    >>> round(dpo_loss(torch.zeros(1), torch.zeros(1), beta=0.1).item(), 4)  # log 2: as at the start of a run
    0.6931
    """
    logits = beta * (policy_margin - reference_margin)
    return -((1 - label_smoothing) * F.logsigmoid(logits) + label_smoothing * F.logsigmoid(-logits)).sum()


def robust_dpo_loss(policy_margin: Tensor, reference_margin: Tensor, *, beta: float, label_smoothing: float) -> Tensor:
    """DPO whose expectation over swapped labels is DPO without them (Chowdhury et al. 2024); it may be negative."""
    if not 0 <= label_smoothing < 0.5:
        raise ConfigError(f"robust DPO: label_smoothing must be at least 0 and below 0.5, not {label_smoothing}")
    logits = beta * (policy_margin - reference_margin)
    losses = label_smoothing * F.logsigmoid(-logits) - (1 - label_smoothing) * F.logsigmoid(logits)
    return losses.sum() / (1 - 2 * label_smoothing)


def ipo_loss(policy_margin: Tensor, reference_margin: Tensor, *, beta: float) -> Tensor:
    """sum (policy - reference margin - 1 / (2 beta))^2 (Azar et al. 2024, eq. 17, where beta is called tau).

    As in TRL, the margins should be those of mean log-probabilities per token, or long completions outweigh short ones.

    >>> ipo_loss(torch.tensor([3.0]), torch.tensor([1.0]), beta=0.5).item()
    1.0
    """
    return (policy_margin - reference_margin - 1 / (2 * beta)).square().sum()


def hinge_loss(policy_margin: Tensor, reference_margin: Tensor, *, beta: float) -> Tensor:
    """sum max(0, 1 - beta (policy - reference margin)) (SLiC: Zhao et al. 2023, with Liu et al. 2024's reference).

    >>> hinge_loss(torch.tensor([3.0]), torch.tensor([1.0]), beta=0.25).item()
    0.5
    """
    return F.relu(1 - beta * (policy_margin - reference_margin)).sum()


def orpo_loss(logprobs: Tensor, lengths: Tensor, *, beta: float, likelihood: Tensor | None = None) -> Tensor:
    """-sum of the likelihood + beta log sigmoid(log odds ratio) (Hong et al. 2024, eq. 6 and 7; beta is lambda).

    The odds are per token of a completion, as the paper's P(y | x) is (eq. 3). The likelihood (B,) of each pair is the
    mean chosen logprob where it is not given.
    """
    means = logprobs / lengths.clamp(min=1)  # (B, 2)
    # an empty completion has probability 1, whose odds are infinite
    means = means.clamp(max=-torch.finfo(means.dtype).eps)
    chosen_log_odds, rejected_log_odds = (means - torch.log(-torch.expm1(means))).unbind(-1)
    likelihood = means[:, 0] if likelihood is None else likelihood
    return -(likelihood + beta * F.logsigmoid(chosen_log_odds - rejected_log_odds)).sum()


def simpo_loss(logprobs: Tensor, lengths: Tensor, *, beta: float, target_margin: float) -> Tensor:
    """-sum log sigmoid(beta (difference of mean logprobs) - target_margin) (Meng et al. 2024, eq. 6).

    target_margin is the paper's gamma, a margin of rewards: beta is already in it.
    """
    chosen, rejected = (logprobs / lengths.clamp(min=1)).unbind(-1)
    return -F.logsigmoid(beta * (chosen - rejected) - target_margin).sum()


def cpo_loss(
    logprobs: Tensor, lengths: Tensor, *, beta: float, nll_coef: float = 1.0, likelihood: Tensor | None = None
) -> Tensor:
    """-sum log sigmoid(beta (chosen - rejected)) + nll_coef likelihood (Xu et al. 2024, 3).

    The likelihood is per token, as in the authors' code: that of a whole completion would drown the preference. It is
    (B,), and the mean chosen logprob where it is not given.
    """
    chosen, rejected = logprobs.unbind(-1)
    likelihood = chosen / lengths[:, 0].clamp(min=1) if likelihood is None else likelihood
    return -(F.logsigmoid(beta * (chosen - rejected)) + nll_coef * likelihood).sum()


def kto_loss(
    log_ratios: Tensor,
    desirable: Tensor,
    kl: Tensor,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """sum weight (1 - sigmoid(+-beta (log_ratios - kl))), + where desirable (Ethayarajh et al. 2024, 4.1).

    log_ratios (B,) are policy minus reference of single completions, kl is what `kto_reference_point` gives.
    """
    sign, weight = torch.where(desirable, 1, -1), torch.where(desirable, desirable_weight, undesirable_weight)
    return (weight * torch.sigmoid(-sign * beta * (log_ratios - kl))).sum()


@torch.no_grad()
def kto_reference_point(log_ratios: Tensor) -> Tensor:
    """The KL divergence, at least 0, from policy minus reference log-probabilities (B,) of mismatched completions.

    Those of all ranks should be in it: the maximum of a mean is not the mean of maxima.
    """
    return log_ratios.mean().clamp(min=0)


@torch.no_grad()
def preference_metrics(chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
    """Sums over pairs of implicit rewards (B,): beta (policy - reference log-probability), or beta policy without one."""
    return {
        "rewards/chosen": chosen.sum(),
        "rewards/rejected": rejected.sum(),
        "rewards/margins": (chosen - rejected).sum(),
        "rewards/accuracies": reward_accuracy(chosen, rejected),
    }
