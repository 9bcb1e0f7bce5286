"""The schedule of a mixture: shares to within a row, an order of seed and position alone, sources that end."""

from collections import Counter

import numpy as np
import pytest

from genai_pl.data.mixture import Draw, Mixture, SourcePlan
from genai_pl.errors import DataError


def plan(weight: object, costs: object, n_rows: int | None = 40, **limits: int) -> SourcePlan:
    points = weight if isinstance(weight, list) else [(0.0, float(weight))]
    return SourcePlan("s", points, n_rows, costs, costs, **limits)


def draws(mixture: Mixture, n: int) -> list[Draw]:
    return [mixture.take() for _ in range(n)]


@pytest.mark.parametrize("seed", range(20))
def test_no_source_is_further_from_its_share_than_its_longest_row(seed: int) -> None:
    draw = np.random.default_rng(seed)
    sources = []
    for _ in range(int(draw.integers(2, 7))):
        n = int(draw.integers(1, 50))
        costs = draw.integers(1, 100, n) if draw.random() < 0.7 else int(draw.integers(1, 100))
        weight = [(0.0, float(draw.random() ** 3 + 1e-3))]
        weight += [(1.0, float(draw.random()))] if seed % 3 == 0 else []
        sources.append(plan(weight, costs, n))
    mixture, longest = Mixture(sources, total_rows=1000), max(int(np.max(s.costs)) for s in sources)
    # what each is entitled to, summed here from the weights at each row
    entitled = np.zeros(len(sources))
    for n in range(1000):
        at = [np.interp(n / 1000, *zip(*s.weight, strict=True)) for s in sources]
        before = sum(mixture.spent)
        mixture.take()
        entitled += np.asarray(at) / sum(at) * (sum(mixture.spent) - before)
        assert np.abs(entitled - mixture.spent).max() < longest


def test_shares_are_exact_to_a_thousandth_after_a_million_tokens() -> None:
    draw = np.random.default_rng(0)
    sources = [plan(0.5, 512, 300), plan(0.3, 512, None), plan(0.2, draw.integers(30, 513, 500), 500)]
    mixture = Mixture(sources, total_rows=2500)
    while sum(mixture.tokens) < 10**6:
        mixture.take()
    shares = np.asarray(mixture.tokens) / sum(mixture.tokens)
    assert np.abs(shares - [0.5, 0.3, 0.2]).max() < 1e-3


def test_a_schedule_of_weights_gives_its_integral() -> None:
    up, down = [(0.0, 0.0), (1.0, 1.0)], [(0.0, 1.0), (1.0, 0.0)]
    mixture = Mixture([plan(up, 10), plan(down, 10)], total_rows=1000)
    for n in (250, 500, 1000):  # the integral of x is x^2 / 2
        draws(mixture, n - sum(mixture.rows))
        assert abs(mixture.rows[0] - 1000 * (n / 1000) ** 2 / 2) <= 1


def test_a_temperature_flattens_weights() -> None:
    mixture = Mixture([plan(9, 1), plan(1, 1)], total_rows=10, temperature=2.0)
    assert mixture.weights() == [0.75, 0.25]  # 3 : 1, the roots


def test_a_pass_has_every_row_once_in_an_order_of_its_own() -> None:
    mixture = Mixture([plan(1, 1, 10), plan(1, 1, 7)], total_rows=100, seed=3)
    rows = draws(mixture, 40)
    for source, size in ((0, 10), (1, 7)):
        passes = [[d.row for d in rows if (d.source, d.epoch) == (source, epoch)] for epoch in (0, 1)]
        assert all(sorted(one) == list(range(size)) for one in passes)
        assert passes[0] != passes[1]
    assert draws(Mixture(mixture.plans, total_rows=100, seed=4), 40) != rows
    in_order = draws(Mixture(mixture.plans, total_rows=100, shuffle=False), 40)
    assert [d.row for d in in_order if d.source == 0] == [*range(10), *range(10)]


@pytest.mark.parametrize("stop", [0, 1, 13, 64])
def test_a_schedule_goes_on_from_its_state(stop: int) -> None:
    draw = np.random.default_rng(1)
    sources = [
        plan([(0.0, 1.0), (0.5, 3.0)], draw.integers(1, 9, 12), 12),
        plan(2, 5, None),
        plan(1, draw.integers(1, 9, 5), 5, max_rows=10),
    ]
    expected = draws(Mixture(sources, total_rows=100), 100)
    first = Mixture(sources, total_rows=100)
    draws(first, stop)
    second = Mixture(sources, total_rows=100)
    second.load_state_dict(first.state_dict())
    assert draws(second, 100 - stop) == expected[stop:]


def test_a_source_ends_and_the_others_share_its_weight() -> None:
    mixture = Mixture([plan(2, 4, 5, max_rows=10), plan(1, 4, None, cap=19), plan(1, 4, None)], total_rows=100)
    counts = Counter(d.source for d in draws(mixture, 60))
    assert counts == {0: 10, 1: 4, 2: 46}  # two passes of 5; 4 rows of 4 tokens, as a fifth would exceed 19
    assert [mixture.ended(n) for n in range(3)] == [True, True, False]


def test_a_mixture_whose_sources_have_all_ended_says_so() -> None:
    mixture = Mixture([plan(1, 1, 3, max_rows=3), plan([(0.0, 0.0), (1.0, 1.0)], 1, 3, max_rows=6)], total_rows=10)
    with pytest.raises(DataError, match=r"data.sources: after 9 rows \(90% of the run\) every source has ended"):
        draws(mixture, 10)
