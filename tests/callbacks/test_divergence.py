"""Divergence is reported while it happens, and noise is not."""

import math
import random
from collections.abc import Callable

import pytest

from genai_pl.callbacks import Divergence, LossWatch
from tests.conftest import TINY


def events(losses: list[float]) -> tuple[list[int], LossWatch]:
    """The steps at which a divergence begins."""
    watch = LossWatch()
    return [step for step, loss in enumerate(losses, start=1) if watch.add(step, loss)], watch


def drawn(loss: Callable[[random.Random, int], float], seed: int, n: int) -> list[float]:
    draw = random.Random(seed)
    return [loss(draw, step) for step in range(1, n + 1)]


def gamma(draw: random.Random, mean: float, spread: float) -> float:
    """A positive loss whose standard deviation is this many times its mean."""
    return draw.gammavariate(1 / spread**2, mean * spread**2)


ORDINARY: dict[str, Callable[[random.Random, int], float]] = {
    "pretraining": lambda draw, t: 1.4 + 5.5 * math.exp(-t / 100) + draw.gauss(0, 0.05),
    "small batches": lambda draw, t: gamma(draw, 1.0, 0.6),
    "single short answers": lambda draw, t: gamma(draw, 1.0, 1.0),
    "learned by heart": lambda draw, t: gamma(draw, 2 * math.exp(-t / 500) + 0.01, 0.8),
    "preferences with hard pairs": lambda draw, t: 3.0 if draw.random() < 0.05 else gamma(draw, 0.05, 0.5),
    "between 0 and 1": lambda draw, t: draw.uniform(0.2, 0.8),
    "easy and hard documents in turn": lambda draw, t: (1.0 if (t // 50) % 2 else 2.5) + draw.gauss(0, 0.1),
    "a bump after warmup": lambda draw, t: 2.0 + 1.5 * (20 < t < 60) + draw.gauss(0, 0.2),
    "below 0": lambda draw, t: -1.0 - 0.001 * t + draw.gauss(0, 0.2),
}


@pytest.mark.parametrize("kind", ORDINARY)
def test_an_ordinary_noisy_run_is_no_divergence(kind: str) -> None:
    for seed in range(10):
        assert events(drawn(ORDINARY[kind], seed, 1000))[0] == []
    for seed in range(100):
        assert events(drawn(ORDINARY[kind], seed, 12))[0] == []


@pytest.mark.parametrize(
    ("losses", "steps"),
    [
        ([6.9, 220.0, 2161.0], [3]),
        ([5.55, 5.57, 160.7, 247.3, 185.9], [4]),
        ([*[1.5] * 100, *[7.0] * 20], [105]),  # back to what no model knows: all of five losses, not a spike
        ([*[1.5] * 100, 7.0, 7.0, *[1.5] * 20], []),
        ([*[1.5] * 50, *[9.0] * 10, *[1.5] * 50, *[9.0] * 10], [55, 115]),  # each time once
        ([6.9, math.nan, math.inf, 6.8], []),  # fp16 leaves these steps out
    ],
)
def test_a_loss_far_above_its_best_is_one_event(losses: list[float], steps: list[int]) -> None:
    assert events(losses)[0] == steps


def test_the_state_of_the_watch_goes_on_in_a_resumed_run() -> None:
    losses = drawn(ORDINARY["small batches"], 3, 40) + [50.0] * 8
    whole, before, after = events(losses)[0], Divergence(), Divergence()
    actual = [step for step, loss in enumerate(losses[:45], start=1) if before.watch.add(step, loss)]
    after.load_state_dict(before.state_dict())
    assert vars(after.watch) == vars(before.watch)
    actual += [step for step, loss in enumerate(losses[45:], start=46) if after.watch.add(step, loss)]
    assert actual == whole != []


def test_a_rate_of_10_is_said_while_the_loss_explodes_and_at_the_end(command) -> None:
    result = command("train", *TINY, "trainer.max_steps=12", "optimizer.lr=10")
    assert result.status == 0, result.err
    lines = [line for line in result.out.splitlines() if line.startswith("diverg")]
    assert [line.split()[0] for line in lines] == ["diverging", "diverged"]
    rows = [line.split() for line in result.out.splitlines() if line.split()[:1] and line.split()[0].isdigit()]
    losses = {int(row[0]): float(row[1]) for row in rows if row[1][0].isdigit()}
    assert f"loss {losses[12]:.4g} at step 12, best" in lines[1]
    assert losses[12] > 3 * losses[1]


def test_a_gradient_that_is_no_number_ends_the_run_with_its_step(command) -> None:
    result = command("train", *TINY, "trainer.max_steps=12", "optimizer=sgd", "optimizer.lr=1e30")
    assert result.status != 0
    assert "is not finite at step " in result.err
    assert result.err.count("\n") == 1
