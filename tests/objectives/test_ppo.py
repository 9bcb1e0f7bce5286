"""PPO's pieces against loops over tokens, closed forms and samples."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from genai_pl.errors import ConfigError
from genai_pl.objectives import (
    IGNORED,
    adapt_kl_coef,
    clipped_surrogate,
    gae,
    kl_estimate,
    kl_rewards,
    moment_sums,
    policy_loss,
    policy_metrics,
    token_entropy,
    value_loss,
    whiten,
)
from genai_pl.objectives.grpo import clipped_tokens

RNG = np.random.default_rng(2)
# a prompt of 2 and padding; only padding; a single token; no prompt; words of someone else in between; no completion
MASK = torch.tensor(
    [
        [0, 0, 1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 1, 1, 0, 0],
        [0, 0, 0, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 1, 1, 1],
        [0, 1, 1, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 0, 0, 0],
    ]
).bool()
B, T = MASK.shape


def normal(*shape: int, mean: float = 0.0, scale: float = 1.0) -> torch.Tensor:
    return torch.from_numpy(RNG.normal(mean, scale, shape))


REWARDS, VALUES, RETURNS, OLD_VALUES, ADVANTAGES = (normal(B, T) for _ in range(5))
OLD = normal(B, T, mean=-2, scale=0.5)
NEW = OLD + normal(B, T, scale=0.3)


def places(row: int) -> list[int]:
    return [t for t in range(T) if MASK[row, t]]


def each_token():
    return [(row, t) for row in range(B) for t in places(row)]


def advantages_by_definition(gamma: float, gae_lambda: float) -> np.ndarray:
    """The sum over l of (gamma lambda)^l delta_{t+l}, where time is the tokens of the mask."""
    result = np.zeros((B, T))
    for row in range(B):
        times = places(row)
        r, v = [REWARDS[row, t].item() for t in times], [VALUES[row, t].item() for t in times] + [0.0]
        deltas = [r[i] + gamma * v[i + 1] - v[i] for i in range(len(times))]
        for i, t in enumerate(times):
            result[row, t] = sum((gamma * gae_lambda) ** k * d for k, d in enumerate(deltas[i:]))
    return result


@pytest.mark.parametrize(("gamma", "gae_lambda"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.9, 0.0)])
def test_advantages_are_the_discounted_sum_of_temporal_differences(gamma: float, gae_lambda: float) -> None:
    advantages, returns = gae(REWARDS, VALUES, MASK, gamma=gamma, gae_lambda=gae_lambda)
    expected = torch.from_numpy(advantages_by_definition(gamma, gae_lambda))
    torch.testing.assert_close(advantages, expected)
    torch.testing.assert_close(returns, torch.where(MASK, expected + VALUES, 0))


def test_with_lambda_1_returns_are_the_discounted_rewards_to_go() -> None:
    _, returns = gae(REWARDS, VALUES, MASK, gamma=0.9, gae_lambda=1.0)
    for row in range(B):
        times = places(row)
        for i, t in enumerate(times):
            to_go = sum(0.9**k * REWARDS[row, s].item() for k, s in enumerate(times[i:]))
            assert returns[row, t].item() == pytest.approx(to_go)


def test_what_stands_outside_the_mask_changes_nothing() -> None:
    noise = torch.where(MASK, 0, torch.full((B, T), 1e3, dtype=torch.float64))
    for before, after in zip(
        gae(REWARDS, VALUES, MASK, gamma=0.9, gae_lambda=0.8),
        gae(REWARDS + noise, VALUES + noise, MASK, gamma=0.9, gae_lambda=0.8),
        strict=True,
    ):
        assert torch.equal(before, after)
    scores = normal(B)
    assert torch.equal(
        kl_rewards(scores, NEW - OLD, MASK, kl_coef=0.1), kl_rewards(scores, NEW - OLD + noise, MASK, kl_coef=0.1)
    )
    new = (NEW + noise).requires_grad_()
    loss = policy_loss(new, OLD - noise, ADVANTAGES, MASK, clip_range=0.2)
    assert loss == policy_loss(NEW, OLD, ADVANTAGES, MASK, clip_range=0.2)
    (gradient,) = torch.autograd.grad(loss, new)
    assert torch.isfinite(gradient).all()
    assert not gradient[~MASK].any()
    assert torch.equal(whiten(ADVANTAGES + noise, MASK), whiten(ADVANTAGES, MASK))
    values = {"old_values": OLD_VALUES, "returns": RETURNS, "mask": MASK, "clip_range": 0.2}
    assert value_loss(VALUES + noise, **values) == value_loss(VALUES, **values)
    ours, theirs = policy_metrics(NEW, OLD, MASK), policy_metrics(NEW + noise, OLD, MASK)
    assert ours == theirs


def test_the_policy_loss_is_the_clipped_surrogate_of_every_token() -> None:
    expected, clipped = 0.0, 0
    for row, t in each_token():
        ratio, advantage = math.exp(NEW[row, t] - OLD[row, t]), ADVANTAGES[row, t].item()
        bounded = min(max(ratio, 0.8), 1.2)
        expected -= min(ratio * advantage, bounded * advantage)
        clipped += bounded * advantage < ratio * advantage
    loss = policy_loss(NEW, OLD, ADVANTAGES, MASK, clip_range=0.2)
    assert loss.item() == pytest.approx(expected)
    metrics = policy_metrics(NEW, OLD, MASK)
    assert 0 < clipped_tokens("grpo", NEW, OLD, ADVANTAGES, MASK, clip_range=0.2) == clipped < MASK.sum()
    ratios = [math.exp(NEW[place] - OLD[place]) for place in each_token()]
    assert metrics["policy/ratio"].item() == pytest.approx(sum(ratios))
    assert metrics["policy/approxkl"].item() == pytest.approx(sum(r - 1 - math.log(r) for r in ratios))


def test_a_higher_upper_clip_holds_for_rising_tokens_only() -> None:
    old, new = torch.zeros(1, 3), torch.tensor([[1.5, 0.5, 0.5]]).log()
    mask, advantages = torch.ones(1, 3).bool(), torch.tensor([[1.0, -1.0, 0.0]])
    losses = clipped_surrogate(new, old, advantages, mask, clip_range=0.2, clip_range_high=0.3)
    torch.testing.assert_close(losses, torch.tensor([[-1.3, 0.8, 0.0]]))
    assert clipped_tokens("grpo", new, old, advantages, mask, clip_range=0.2, clip_range_high=0.6) == 1


def test_where_the_policy_is_still_the_old_one_the_gradient_is_that_of_reinforce() -> None:
    new = OLD.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(policy_loss(new, OLD, ADVANTAGES, MASK, clip_range=0.2), new)
    torch.testing.assert_close(gradient, torch.where(MASK, -ADVANTAGES, 0))


def slope(loss, x: torch.Tensor) -> tuple[float, float]:
    """The derivative along a direction, by autograd and by finite differences."""
    direction, leaf = normal(*x.shape), x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf), leaf)
    return (gradient * direction).sum().item(), (
        (loss(x + 1e-6 * direction) - loss(x - 1e-6 * direction)) / 2e-6
    ).item()


def test_gradients_are_those_of_finite_differences() -> None:
    exact, measured = slope(lambda x: policy_loss(x, OLD, ADVANTAGES, MASK, clip_range=0.2), NEW)
    assert exact == pytest.approx(measured, rel=1e-6)
    exact, measured = slope(lambda x: value_loss(x, OLD_VALUES, RETURNS, MASK, clip_range=0.5), VALUES)
    assert exact == pytest.approx(measured, rel=1e-6)


def test_the_value_loss_takes_the_worse_of_both_errors() -> None:
    expected = 0.0
    for place in each_token():
        value, old, wanted = VALUES[place].item(), OLD_VALUES[place].item(), RETURNS[place].item()
        clipped = min(max(value, old - 0.2), old + 0.2)
        expected += 0.5 * max((value - wanted) ** 2, (clipped - wanted) ** 2)
    loss = value_loss(VALUES, OLD_VALUES, RETURNS, MASK, clip_range=0.2)
    assert loss.item() == pytest.approx(expected)
    free = value_loss(VALUES, OLD_VALUES, RETURNS, MASK, clip_range=1e9)
    torch.testing.assert_close(free, ((VALUES - RETURNS)[MASK] ** 2).sum() / 2)


def test_the_score_is_paid_at_the_last_token_and_every_token_pays_for_its_divergence() -> None:
    scores, kl = normal(B), normal(B, T)
    rewards = kl_rewards(scores, kl, MASK, kl_coef=0.3)
    for row in range(B):
        expected = [0.0] * T
        for t in places(row):
            expected[t] = -0.3 * kl[row, t].item() + (scores[row].item() if t == max(places(row)) else 0)
        assert rewards[row].tolist() == pytest.approx(expected)


def test_kl_estimators_agree_with_the_divergence_of_two_gaussians() -> None:
    shift, n = 0.3, 200_000  # KL(N(0, 1) || N(0.3, 1)) = 0.3^2 / 2
    x = normal(n)
    logprobs, reference = -x.square() / 2, -(x - shift).square() / 2
    estimates = {kind: kl_estimate(logprobs, reference, kind) for kind in ("k1", "k2", "k3")}
    for kind in ("k1", "k3"):
        error = estimates[kind].std().item() / math.sqrt(n)
        assert estimates[kind].mean().item() == pytest.approx(shift**2 / 2, abs=4 * error)
    assert estimates["k2"].mean().item() == pytest.approx((shift**2 + shift**4 / 4) / 2, rel=0.05)  # E[(log p/q)^2] / 2
    assert estimates["k3"].min() >= 0
    assert estimates["k3"].std() < 0.3 * estimates["k1"].std()


def test_an_unknown_kl_estimator_is_an_error_that_names_the_others() -> None:
    with pytest.raises(ConfigError, match="choose k1, k2 or k3"):
        kl_estimate(NEW, OLD, "k4")


def test_the_kl_coefficient_moves_towards_the_target_at_a_bounded_speed() -> None:
    options = {"target": 6.0, "horizon": 10_000, "n_steps": 512}
    assert adapt_kl_coef(0.2, 6.0, **options) == pytest.approx(0.2)
    assert adapt_kl_coef(0.2, 6.6, **options) == pytest.approx(0.2 * (1 + 0.1 * 0.0512))
    assert adapt_kl_coef(0.2, 600.0, **options) == pytest.approx(0.2 * (1 + 0.2 * 0.0512))
    assert adapt_kl_coef(0.2, -9.0, **options) == pytest.approx(0.2 * (1 - 0.2 * 0.0512))


def test_whitening_leaves_mean_0_and_variance_1() -> None:
    found = whiten(3 * ADVANTAGES + 7, MASK)
    kept = found[MASK].numpy()
    assert kept.mean() == pytest.approx(0, abs=1e-9)
    assert kept.var(ddof=1) == pytest.approx(1, abs=1e-6)
    assert not found[~MASK].any()


def test_ranks_that_add_up_their_sums_whiten_as_one() -> None:
    whole = whiten(ADVANTAGES, MASK)
    sums = sum(moment_sums(ADVANTAGES[i : i + 2], MASK[i : i + 2]) for i in (0, 2, 4))
    parts = [whiten(ADVANTAGES[i : i + 2], MASK[i : i + 2], sums=sums) for i in (0, 2, 4)]
    torch.testing.assert_close(torch.cat(parts), whole)


@pytest.mark.parametrize("n", [0, 1])
def test_a_single_token_or_none_whitens_to_0(n: int) -> None:
    mask = torch.arange(3)[None] < n
    assert whiten(torch.full((1, 3), 5.0), mask).tolist() == [[0, 0, 0]]


def test_whitening_keeps_float32_and_large_offsets() -> None:
    values = (1000 + ADVANTAGES).float()
    found = whiten(values, torch.ones(B, T).bool())
    expected = (values.double() - values.double().mean()) / values.double().std()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-4)


def test_entropy_is_that_of_the_distribution_at_each_label(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("genai_pl.kernels.chunked_logits.CHUNK_BYTES", 4 * 11 * 3)  # three tokens a chunk
    hidden, head, bias = normal(2, 5, 4), normal(11, 4), normal(11)
    labels = torch.randint(0, 11, (2, 5), generator=torch.Generator().manual_seed(0))
    labels[0, :2] = IGNORED
    found = token_entropy(hidden, head, labels, bias=bias, softcap=2.0)
    probs = F.softmax(2 * torch.tanh((hidden @ head.t() + bias) / 2), dim=-1)
    for row in range(2):
        for t in range(5):
            expected = -sum(p * math.log(p) for p in probs[row, t].tolist())
            assert found[row, t].item() == pytest.approx(expected if labels[row, t] != IGNORED else 0)
    flat = token_entropy(torch.zeros(1, 4), torch.ones(11, 4), torch.tensor([3]))
    assert flat.item() == pytest.approx(math.log(11), rel=1e-6)


def test_the_gradient_of_entropy_is_that_of_whole_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("genai_pl.kernels.chunked_logits.CHUNK_BYTES", 4 * 11 * 3)  # three tokens a chunk
    hidden, head = normal(2, 5, 4).requires_grad_(), normal(11, 4).requires_grad_()
    labels = torch.zeros(2, 5, dtype=torch.long)
    labels[1, 3:] = IGNORED
    (token_entropy(hidden, head, labels, softcap=2.0).sum()).backward()
    found = [hidden.grad, head.grad]
    again = [x.detach().clone().requires_grad_() for x in (hidden, head)]
    logits = 2 * torch.tanh(again[0] @ again[1].t() / 2)
    (torch.distributions.Categorical(logits=logits).entropy() * (labels != IGNORED)).sum().backward()
    for ours, theirs in zip(found, again, strict=True):
        torch.testing.assert_close(ours, theirs.grad)
