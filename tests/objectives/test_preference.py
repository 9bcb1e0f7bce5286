"""Preference losses against the formulas of their papers, written out pair by pair."""

import math
from functools import partial

import numpy as np
import pytest
import torch

from genai_pl.errors import ConfigError
from genai_pl.objectives import (
    cpo_loss,
    dpo_loss,
    hinge_loss,
    ipo_loss,
    kto_loss,
    kto_reference_point,
    orpo_loss,
    preference_metrics,
    robust_dpo_loss,
    segment_ends,
    segment_sums,
    sequence_logprobs,
    simpo_loss,
)

RNG = np.random.default_rng(0)
POLICY, REFERENCE = RNG.normal(-30, 6, (9, 2)), RNG.normal(-30, 6, (9, 2))  # chosen, rejected
LENGTHS = RNG.integers(1, 40, (9, 2))
MARGINS = torch.from_numpy(POLICY[:, 0] - POLICY[:, 1]), torch.from_numpy(REFERENCE[:, 0] - REFERENCE[:, 1])
PAIRS = torch.from_numpy(POLICY), torch.from_numpy(LENGTHS)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def over_margins(term) -> float:
    """The sum of a term of h, the log-ratio of the chosen completion minus that of the rejected one."""
    return sum(term((p[0] - r[0]) - (p[1] - r[1])) for p, r in zip(POLICY, REFERENCE, strict=True))


def over_pairs(term) -> float:
    """The sum of a term of both log-probabilities, then both lengths."""
    return sum(term(*p, *n) for p, n in zip(POLICY, LENGTHS, strict=True))


def orpo_term(chosen: float, rejected: float, n_chosen: int, n_rejected: int) -> float:
    p, q = math.exp(chosen / n_chosen), math.exp(rejected / n_rejected)
    odds_ratio = (p / (1 - p)) / (q / (1 - q))
    return -math.log(p) - 0.1 * math.log(sigmoid(math.log(odds_ratio)))


WITH_REFERENCE = {
    "dpo": (partial(dpo_loss, beta=0.1), lambda h: -math.log(sigmoid(0.1 * h))),
    "conservative": (
        partial(dpo_loss, beta=0.1, label_smoothing=0.2),
        lambda h: -0.8 * math.log(sigmoid(0.1 * h)) - 0.2 * math.log(sigmoid(-0.1 * h)),
    ),
    "robust": (
        partial(robust_dpo_loss, beta=0.1, label_smoothing=0.2),
        lambda h: (-0.8 * math.log(sigmoid(0.1 * h)) + 0.2 * math.log(sigmoid(-0.1 * h))) / 0.6,
    ),
    "ipo": (partial(ipo_loss, beta=0.1), lambda h: (h - 5) ** 2),
    "hinge": (partial(hinge_loss, beta=0.1), lambda h: max(0.0, 1 - 0.1 * h)),
}
WITHOUT_REFERENCE = {
    "orpo": (partial(orpo_loss, beta=0.1), orpo_term),
    "simpo": (
        partial(simpo_loss, beta=2.0, target_margin=0.5),
        lambda c, r, n, m: -math.log(sigmoid(2 / n * c - 2 / m * r - 0.5)),
    ),
    "cpo": (
        partial(cpo_loss, beta=0.1, nll_coef=0.5),
        lambda c, r, n, m: -math.log(sigmoid(0.1 * c - 0.1 * r)) - 0.5 * c / n,
    ),
}


@pytest.mark.parametrize("name", WITH_REFERENCE)
def test_a_loss_with_a_reference_is_the_sum_of_its_formula(name: str) -> None:
    loss, term = WITH_REFERENCE[name]
    assert loss(*MARGINS).item() == pytest.approx(over_margins(term), rel=1e-12)


@pytest.mark.parametrize("name", WITHOUT_REFERENCE)
def test_a_loss_without_a_reference_is_the_sum_of_its_formula(name: str) -> None:
    loss, term = WITHOUT_REFERENCE[name]
    assert loss(*PAIRS).item() == pytest.approx(over_pairs(term), rel=1e-12)


@pytest.mark.parametrize("name", [*WITH_REFERENCE, *WITHOUT_REFERENCE])
def test_the_gradient_is_the_slope_along_any_direction(name: str) -> None:
    loss = {**WITH_REFERENCE, **WITHOUT_REFERENCE}[name][0]
    given, other = MARGINS if name in WITH_REFERENCE else PAIRS
    leaf = given.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf, other), leaf)
    direction = torch.from_numpy(RNG.normal(size=given.shape))
    slope = (loss(given + 1e-5 * direction, other) - loss(given - 1e-5 * direction, other)) / 2e-5
    assert (gradient * direction).sum().item() == pytest.approx(slope.item(), rel=1e-6, abs=1e-8)


def test_a_policy_that_is_the_reference_pays_log_2_a_pair_and_is_pulled_by_half_beta() -> None:
    margin = torch.randn(7, dtype=torch.float64).requires_grad_()
    loss = dpo_loss(margin, margin.detach(), beta=0.3)
    assert loss.item() == pytest.approx(7 * math.log(2))
    torch.testing.assert_close(torch.autograd.grad(loss, margin)[0], torch.full((7,), -0.15, dtype=torch.float64))


def test_robust_dpo_under_swapped_labels_is_on_average_dpo_without_them() -> None:
    robust = partial(robust_dpo_loss, beta=0.1, label_smoothing=0.3)
    swapped = robust(-MARGINS[0], -MARGINS[1])
    torch.testing.assert_close(0.7 * robust(*MARGINS) + 0.3 * swapped, dpo_loss(*MARGINS, beta=0.1))
    with pytest.raises(ConfigError, match=r"below 0\.5"):
        robust_dpo_loss(*MARGINS, beta=0.1, label_smoothing=0.5)


@pytest.mark.parametrize("name", WITHOUT_REFERENCE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_empty_completion_has_a_finite_loss_and_gradient(name: str, dtype: torch.dtype) -> None:
    logprobs = torch.tensor([[0.0, -3.0], [-3.0, 0.0], [0.0, 0.0]], dtype=dtype, requires_grad=True)
    loss = WITHOUT_REFERENCE[name][0](logprobs, torch.tensor([[0, 4], [4, 0], [0, 0]]))
    (gradient,) = torch.autograd.grad(loss, logprobs)
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient).all()


def test_extreme_logprobs_do_not_overflow() -> None:
    logprobs = torch.tensor([[-1e4, -1e-6], [-1e-6, -1e4]], requires_grad=True)
    lengths = torch.ones(2, 2)
    for loss, _ in WITHOUT_REFERENCE.values():
        value = loss(logprobs, lengths)
        assert torch.isfinite(value)
        assert torch.isfinite(torch.autograd.grad(value, logprobs)[0]).all()


def test_kto_is_the_weighted_sum_of_its_formula_and_its_reference_point_gets_no_gradient() -> None:
    ratios, desirable = RNG.normal(0, 8, 10), RNG.random(10) < 0.5
    kl, beta = 1.7, 0.1
    expected = 0.0
    for ratio, good in zip(ratios, desirable, strict=True):
        expected += 1.2 * (1 - sigmoid(beta * (ratio - kl))) if good else 0.8 * (1 - sigmoid(beta * (kl - ratio)))
    weights = {"desirable_weight": 1.2, "undesirable_weight": 0.8}
    leaf = torch.from_numpy(ratios).requires_grad_()
    loss = partial(kto_loss, desirable=torch.from_numpy(desirable), kl=torch.tensor(kl), beta=beta, **weights)
    assert loss(leaf).item() == pytest.approx(expected, rel=1e-6)
    assert torch.autograd.gradcheck(lambda r: loss(r), (leaf,))
    (gradient,) = torch.autograd.grad(loss(leaf), leaf)
    assert ((gradient < 0) == torch.from_numpy(desirable)).all()
    assert not kto_reference_point(leaf).requires_grad


def test_the_reference_point_of_kto_is_the_mean_log_ratio_but_never_negative() -> None:
    assert kto_reference_point(torch.tensor([3.0, -1.0])) == 1
    assert kto_reference_point(torch.tensor([-3.0, 1.0])) == 0


def test_sums_leave_out_what_is_masked_even_if_it_is_not_finite() -> None:
    logprobs = torch.tensor([[-1.0, -2.0, float("-inf")], [float("nan"), -4.0, -5.0], [-1.0, -1.0, -1.0]])
    mask = torch.tensor([[True, True, False], [False, False, True], [False, False, False]])
    sums, lengths = sequence_logprobs(logprobs, mask)
    assert sums.tolist() == [-3, -5, 0]
    assert lengths.tolist() == [2, 1, 0]


def test_segment_sums_and_ends_are_those_of_each_segment_alone() -> None:
    segment_ids = torch.tensor([[1, 1, 1, 2, 2, 0], [1, 2, 2, 2, 0, 0], [2, 2, 2, 2, 2, 2]])
    values = torch.from_numpy(RNG.normal(size=(3, 6)))
    sums, ends = segment_sums(values, segment_ids, 2), segment_ends(segment_ids, 2)
    for row in range(3):
        for segment in (1, 2):
            places = [t for t in range(6) if segment_ids[row, t] == segment]
            expected = math.fsum(values[row, t].item() for t in places)
            assert sums[row, segment - 1].item() == pytest.approx(expected)
            assert ends[row, segment - 1] == max(places, default=0)
    assert segment_sums(segment_ids > 0, segment_ids, 2).tolist() == [[3, 2], [1, 3], [0, 6]]


def test_the_gradient_of_segment_sums_reaches_each_token_once() -> None:
    values = torch.zeros(1, 5, requires_grad=True)
    segment_sums(values, torch.tensor([[1, 1, 2, 2, 0]]), 2).mul(torch.tensor([3.0, 5.0])).sum().backward()
    assert values.grad.tolist() == [[3, 3, 5, 5, 0]]


def test_metrics_are_sums_over_pairs_and_a_tie_is_no_success() -> None:
    metrics = preference_metrics(torch.tensor([1.0, 2.0, 0.0]), torch.tensor([-1.0, 3.0, 0.0]))
    assert {name: value.item() for name, value in metrics.items()} == {
        "rewards/chosen": 3,
        "rewards/rejected": 2,
        "rewards/margins": 1,
        "rewards/accuracies": 1,
    }
