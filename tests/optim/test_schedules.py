"""Every curve against transformers' and torch's schedulers, which step a real optimizer."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
import transformers
from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    SequentialLR,
    StepLR,
)

from genai_pl.errors import ConfigError
from genai_pl.optim import constant, cosine, inverse_sqrt, linear, step_decay, wsd

TOTAL = 60
WARMUPS = [0, 1, 12, TOTAL, TOTAL + 15]
Curve = Callable[..., float]


def rates(make: Callable[[Optimizer], LRScheduler], steps: int, lr: float = 1.0) -> list[float]:
    """The learning rate that a scheduler sets at each step."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = make(optimizer)
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


def curve(function: Curve, steps: int, **options: float | str) -> list[float]:
    return [function(step, total_steps=TOTAL, **options) for step in range(steps)]


@pytest.mark.parametrize("warmup", WARMUPS)
def test_constant_is_transformers_curve_also_past_the_end(warmup: int):
    theirs = rates(partial(transformers.get_constant_schedule_with_warmup, num_warmup_steps=warmup), 2 * TOTAL)
    assert curve(constant, 2 * TOTAL, warmup_steps=warmup) == pytest.approx(theirs, abs=1e-12)


@pytest.mark.parametrize("warmup", WARMUPS)
def test_linear_is_transformers_curve_also_past_the_end(warmup: int):
    make = partial(transformers.get_linear_schedule_with_warmup, num_warmup_steps=warmup, num_training_steps=TOTAL)
    ours = curve(linear, 2 * TOTAL, warmup_steps=warmup, min_lr_ratio=0.0)
    assert ours == pytest.approx(rates(make, 2 * TOTAL), abs=1e-12)


@pytest.mark.parametrize("warmup", [0, 1, 12])
def test_linear_with_a_floor_is_transformers_polynomial_of_power_one(warmup: int):
    make = partial(
        transformers.get_polynomial_decay_schedule_with_warmup,
        num_warmup_steps=warmup,
        num_training_steps=TOTAL,
        lr_end=0.1,
        power=1.0,
    )
    ours = curve(linear, 2 * TOTAL, warmup_steps=warmup, min_lr_ratio=0.1)
    assert ours == pytest.approx(rates(make, 2 * TOTAL), abs=1e-12)


def test_linear_without_warmup_is_torch_linear_lr():
    theirs = rates(lambda o: LinearLR(o, start_factor=1.0, end_factor=0.2, total_iters=TOTAL), 2 * TOTAL)
    assert curve(linear, 2 * TOTAL, warmup_steps=0, min_lr_ratio=0.2) == pytest.approx(theirs, abs=1e-12)


@pytest.mark.parametrize("floor", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("warmup", WARMUPS)
def test_cosine_is_transformers_curve_up_to_the_last_step(warmup: int, floor: float):
    make = partial(
        transformers.get_cosine_with_min_lr_schedule_with_warmup,
        num_warmup_steps=warmup,
        num_training_steps=TOTAL,
        min_lr_rate=floor,
    )
    ours = curve(cosine, TOTAL + 1, warmup_steps=warmup, min_lr_ratio=floor)
    assert ours == pytest.approx(rates(make, TOTAL + 1), abs=1e-12)


def test_cosine_without_warmup_is_torch_cosine_annealing_up_to_the_last_step():
    theirs = rates(lambda o: CosineAnnealingLR(o, T_max=TOTAL, eta_min=0.3), TOTAL + 1)
    assert curve(cosine, TOTAL + 1, warmup_steps=0, min_lr_ratio=0.3) == pytest.approx(theirs, abs=1e-12)


def test_cosine_stays_on_its_floor_past_the_end():
    past = [cosine(step, total_steps=TOTAL, warmup_steps=5, min_lr_ratio=0.1) for step in range(TOTAL, 3 * TOTAL)]
    assert past == pytest.approx([0.1] * len(past), abs=1e-12)


@pytest.mark.parametrize("warmup", WARMUPS)
def test_inverse_sqrt_is_transformers_curve_also_past_the_end(warmup: int):
    theirs = rates(partial(transformers.get_inverse_sqrt_schedule, num_warmup_steps=warmup), 2 * TOTAL)
    assert curve(inverse_sqrt, 2 * TOTAL, warmup_steps=warmup) == pytest.approx(theirs, abs=1e-12)


def test_step_decay_without_warmup_is_torch_step_lr():
    theirs = rates(lambda o: StepLR(o, step_size=7, gamma=0.5), 2 * TOTAL)
    assert curve(step_decay, 2 * TOTAL, warmup_steps=0, step_size=7, gamma=0.5) == pytest.approx(theirs, abs=1e-12)


# torch's SequentialLR passes an epoch to its parts, which torch itself deprecates
@pytest.mark.filterwarnings("ignore:The epoch parameter:UserWarning")
def test_step_decay_counts_its_stairs_from_the_end_of_warmup():
    def make(optimizer: Optimizer) -> LRScheduler:
        warmup = transformers.get_constant_schedule_with_warmup(optimizer, num_warmup_steps=10)
        return SequentialLR(optimizer, [warmup, StepLR(optimizer, step_size=7, gamma=0.5)], milestones=[10])

    ours = curve(step_decay, 2 * TOTAL, warmup_steps=10, step_size=7, gamma=0.5)
    assert ours == pytest.approx(rates(make, 2 * TOTAL), abs=1e-12)


@pytest.mark.parametrize(("ours", "theirs"), [("linear", "linear"), ("cosine", "cosine"), ("one_minus_sqrt", "1-sqrt")])
@pytest.mark.parametrize("warmup", [0, 1, 12])
@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_wsd_is_transformers_curve_also_past_the_end(ours: str, theirs: str, warmup: int, floor: float):
    make = partial(
        transformers.get_wsd_schedule,
        num_warmup_steps=warmup,
        num_decay_steps=TOTAL // 4,
        num_training_steps=TOTAL,
        decay_type=theirs,
        min_lr_ratio=floor,
    )
    options = {"warmup_steps": warmup, "decay_fraction": 0.25, "min_lr_ratio": floor, "decay": ours}
    assert curve(wsd, 2 * TOTAL, **options) == pytest.approx(rates(make, 2 * TOTAL), abs=1e-12)


def test_wsd_lets_warmup_eat_into_the_decay_without_a_jump():
    ours = curve(wsd, TOTAL + 1, warmup_steps=50, decay_fraction=0.9, min_lr_ratio=0.0, decay="linear")
    assert ours[50] == 1.0
    assert ours[50:] == pytest.approx([1.0 - i / 10 for i in range(11)], abs=1e-12)


@pytest.mark.parametrize(
    "schedule",
    [
        partial(constant, warmup_steps=100),
        partial(linear, warmup_steps=100, min_lr_ratio=0.1),
        partial(cosine, warmup_steps=100, min_lr_ratio=0.1),
        partial(inverse_sqrt, warmup_steps=100),
        partial(step_decay, warmup_steps=100, step_size=3, gamma=0.5),
        partial(wsd, warmup_steps=100, decay_fraction=0.5, min_lr_ratio=0.0, decay="linear"),
    ],
    ids=lambda schedule: schedule.func.__name__,
)
@pytest.mark.parametrize("total", [0, 1, 40])
def test_a_run_shorter_than_its_warmup_only_warms_up(schedule: partial, total: int):
    multipliers = [schedule(step, total_steps=total) for step in range(total + 1)]
    assert multipliers == pytest.approx([step / 100 for step in range(total + 1)], abs=1e-12)
    assert all(0.0 <= schedule(step, total_steps=total) <= 1.0 for step in range(300))


def test_lambda_lr_of_a_curve_multiplies_the_base_rate():
    make = partial(LambdaLR, lr_lambda=partial(constant, total_steps=TOTAL, warmup_steps=0))
    assert rates(make, 5, lr=0.3) == rates(lambda o: ConstantLR(o, factor=1.0), 5, lr=0.3)


@pytest.mark.parametrize(
    ("schedule", "option"),
    [
        (partial(constant, warmup_steps=-1), "scheduler.warmup_steps"),
        (partial(cosine, warmup_steps=0, min_lr_ratio=1.5), "scheduler.min_lr_ratio"),
        (partial(linear, warmup_steps=0, min_lr_ratio=-0.1), "scheduler.min_lr_ratio"),
        (partial(step_decay, warmup_steps=0, step_size=0, gamma=0.5), "scheduler.step_size"),
        (partial(step_decay, warmup_steps=0, step_size=5, gamma=-1.0), "scheduler.gamma"),
        (partial(wsd, warmup_steps=0, decay_fraction=2.0, min_lr_ratio=0.0, decay="linear"), "decay_fraction"),
        (partial(wsd, warmup_steps=0, decay_fraction=0.1, min_lr_ratio=0.0, decay="square"), "linear, cosine"),
    ],
)
def test_an_option_out_of_range_is_an_error_that_names_it(schedule: partial, option: str):
    with pytest.raises(ConfigError, match=option):
        schedule(0, total_steps=TOTAL)
