"""GSPO, CISPO, DAPO, Dr. GRPO, RLOO and REINFORCE++ against the losses of TRL's trainers on random tensors, and NumPy."""

from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from trl.rewards import get_soft_overlong_punishment
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.rloo_trainer import RLOOTrainer

from genai_pl.objectives.grpo import (
    SURROGATES,
    clipped_tokens,
    completion_weights,
    equal_groups,
    group_advantages,
    grpo_loss,
    overlong_penalty,
    reinforce_returns,
    rloo_advantages,
)
from genai_pl.objectives.ppo import kl_rewards, whiten

RNG = np.random.default_rng(11)
LENGTHS = torch.tensor([7, 2, 5, 1, 6, 7])
MASK = torch.arange(7) < LENGTHS[:, None]
OLD = torch.from_numpy(RNG.normal(-2, 0.5, MASK.shape))
NEW = OLD + torch.from_numpy(RNG.normal(0, 0.4, MASK.shape))
REFERENCE = OLD + torch.from_numpy(RNG.normal(0, 0.4, MASK.shape))
ADVANTAGES = torch.from_numpy(RNG.normal(size=6))
LONGEST = 9


def trl_self(logprobs: torch.Tensor, *, low: float, high: float, beta: float, **options: object) -> SimpleNamespace:
    """What the loss functions of TRL's trainers read of their trainer, around given log-probabilities."""
    accelerator = SimpleNamespace(
        num_processes=1, sync_gradients=False, gather=lambda x: x, reduce=lambda x, reduction: x
    )
    arguments = SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1)
    return SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, torch.zeros_like(logprobs), None),
        accelerator=accelerator,
        args=arguments,
        model=SimpleNamespace(training=True),
        epsilon_low=low,
        epsilon_high=high,
        beta=beta,
        max_completion_length=LONGEST,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        current_gradient_accumulation_steps=1,
        _metrics=defaultdict(lambda: defaultdict(list)),
        **options,
    )


def trl_inputs() -> dict[str, torch.Tensor]:
    ids = torch.zeros(MASK.shape, dtype=torch.long)
    return {
        "prompt_ids": ids[:, :1],
        "prompt_mask": MASK[:, :1],
        "completion_ids": ids,
        "completion_mask": MASK.double(),
        "advantages": ADVANTAGES,
        "old_per_token_logps": OLD,
        "ref_per_token_logps": REFERENCE,
        "num_items_in_batch": MASK.sum(),
        "old_logps": torch.where(MASK, OLD, 0).sum(1),
    }


def ours(
    logprobs: torch.Tensor, loss: str, normalization: str, *, rows: slice = slice(None), **options: object
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of some rows, and its divisor."""
    weights, divisor = completion_weights(MASK[rows], normalization=normalization, length=LONGEST)
    reference = {"reference_logprobs": REFERENCE[rows]} if options.get("beta") else {}
    arguments = (logprobs[rows], OLD[rows], ADVANTAGES[rows], weights)
    return grpo_loss(*arguments, surrogate=SURROGATES[loss], **reference, **options), divisor


# loss_type and level of TRL, our loss and normalization, and TRL's upper bound (of CISPO it is that of the weight itself)
CASES = {
    "grpo": ("grpo", "token", "grpo", "sequence", 0.2),
    "bnpo": ("bnpo", "token", "grpo", "token", 0.2),
    "dapo": ("dapo", "token", "grpo", "token", 0.28),
    "dr_grpo": ("dr_grpo", "token", "grpo", "constant", 0.2),
    "cispo": ("cispo", "token", "cispo", "token", 1.3),
    "gspo": ("grpo", "sequence", "gspo", "sequence", 0.2),
}


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_are_those_of_trl(case: str, beta: float) -> None:
    loss_type, level, loss, normalization, high = CASES[case]
    theirs_leaf, ours_leaf = NEW.clone().requires_grad_(), NEW.clone().requires_grad_()
    trainer = trl_self(theirs_leaf, low=0.2, high=high, beta=beta, loss_type=loss_type, importance_sampling_level=level)
    expected = GRPOTrainer._compute_loss(trainer, None, trl_inputs())
    clip = {"clip_range": 0.2, "clip_range_high": high - 1 if loss == "cispo" else high}
    total, divisor = ours(ours_leaf, loss, normalization, beta=beta, **clip)
    torch.testing.assert_close(total / divisor, expected)
    (total / divisor).backward()
    expected.backward()
    torch.testing.assert_close(ours_leaf.grad, torch.where(MASK, theirs_leaf.grad, 0))
    if loss == "gspo":  # TRL counts completions, we count their tokens
        return
    if loss == "grpo":
        ratio = trainer._metrics["train"]["clip_ratio/region_mean"][0]
        found = clipped_tokens(loss, NEW, OLD, ADVANTAGES[:, None], MASK, **clip)
        assert found.item() == pytest.approx(ratio * MASK.sum().item())


def test_rloo_is_trls() -> None:
    theirs_leaf, ours_leaf = NEW.clone().requires_grad_(), NEW.clone().requires_grad_()
    expected = RLOOTrainer._compute_loss(trl_self(theirs_leaf, low=0.2, high=0.3, beta=0.0), None, trl_inputs())
    total, divisor = ours(ours_leaf, "rloo", "sequence", clip_range=0.2, clip_range_high=0.3)
    torch.testing.assert_close(total / divisor, expected)
    (total / divisor).backward()
    expected.backward()
    torch.testing.assert_close(ours_leaf.grad, torch.where(MASK, theirs_leaf.grad, 0))


@pytest.mark.parametrize("normalization", ["sequence", "token", "constant"])
@pytest.mark.parametrize("loss", SURROGATES)
def test_accumulation_and_what_stands_in_padding_change_nothing(loss: str, normalization: str) -> None:
    whole, parts = NEW.clone().requires_grad_(), torch.where(MASK, NEW, 1e3).requires_grad_()
    options = {"clip_range": 0.2, "clip_range_high": 0.3, "beta": 0.04}
    total, divisor = ours(whole, loss, normalization, **options)
    (total / divisor).backward()
    # the divisor of all batches is known before the first backward pass, as in a step over ranks and micro-batches
    for rows in (slice(0, 1), slice(1, 4), slice(4, 6)):
        (ours(parts, loss, normalization, rows=rows, **options)[0] / divisor).backward()
    torch.testing.assert_close(parts.grad, whole.grad)
    assert not parts.grad[~MASK].any()


def test_before_the_first_update_every_gradient_is_that_of_the_log_probability() -> None:
    for loss in SURROGATES:
        leaf = OLD.clone().requires_grad_()
        weights, _ = completion_weights(MASK, normalization="token")
        grpo_loss(leaf, OLD, ADVANTAGES, weights, surrogate=SURROGATES[loss], clip_range=0.2).backward()
        expected = torch.where(MASK, -ADVANTAGES[:, None].expand_as(OLD), 0)
        if loss == "rloo":  # each token's ratio is that of all
            expected = expected * LENGTHS[:, None]
        torch.testing.assert_close(leaf.grad, expected)


def test_rewards_are_scaled_by_the_batch_and_baselines_left_out_as_in_trl() -> None:
    rewards = torch.from_numpy(RNG.normal(2, 5, 12))
    rewards[3] = float("nan")
    groups = rewards.view(3, 4).numpy()
    expected = (groups - np.nanmean(groups, 1, keepdims=True)) / (np.nanstd(groups, ddof=1) + 1e-4)
    found = group_advantages(rewards, 4, scale="batch")
    torch.testing.assert_close(found, torch.from_numpy(np.nan_to_num(expected)).flatten())
    others = np.nansum(groups, 1, keepdims=True) - groups
    left_out = np.nan_to_num(groups - others / (np.isfinite(groups).sum(1, keepdims=True) - 1))
    torch.testing.assert_close(rloo_advantages(rewards, 4), torch.from_numpy(left_out).flatten())


def test_reinforce_returns_are_rewards_less_the_divergence_still_to_come() -> None:
    rewards, kl = torch.from_numpy(RNG.normal(size=6)), torch.where(MASK, NEW - REFERENCE, 0)
    expected = np.zeros(MASK.shape)
    for row, n in enumerate(LENGTHS.tolist()):
        for t in range(n):
            expected[row, t] = rewards[row] - 0.1 * kl[row, t:n].sum()
    found = reinforce_returns(rewards, kl, MASK, beta=0.1)
    torch.testing.assert_close(found, torch.from_numpy(expected))
    assert found.sum(1)[3] == kl_rewards(rewards, kl, MASK, kl_coef=0.1).sum(1)[3]  # of one token
    tokens = expected[MASK.numpy()]
    whitened = (tokens - tokens.mean()) / np.sqrt(tokens.var(ddof=1) + 1e-8)
    torch.testing.assert_close(whiten(found, MASK)[MASK], torch.from_numpy(whitened))


def test_the_overlong_punishment_is_trls() -> None:
    lengths = torch.arange(1, 101)
    punish = get_soft_overlong_punishment(100, 20)
    expected = punish([[0] * n for n in lengths.tolist()])
    assert overlong_penalty(lengths, longest=100, buffer=20).tolist() == pytest.approx(expected)


def test_groups_of_equal_rewards_are_those_without_a_gradient() -> None:
    rewards = torch.tensor([0.1, 0.1, 0.1, 1.0, 0.0, 1.0, float("nan"), 2.0, 2.0])
    equal = equal_groups(rewards, 3)
    assert equal.tolist() == [True, False, True]
    assert (group_advantages(rewards, 3).view(3, 3) == 0).all(1).tolist() == equal.tolist()
