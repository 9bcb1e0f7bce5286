"""Learning-rate schedules: the multiplier of the base learning rate at a step, which counts from 0.

Every curve is called as `curve(step, total_steps=..., **its options)`, so that the caller need not know which of them
has an end. Warmup rises linearly and reaches 1 at `step == warmup_steps`. Past `total_steps` a curve stays where it
ended.
"""

import math

from genai_pl.optim.checks import check, choose

DECAYS = {
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
    "one_minus_sqrt": lambda progress: 1.0 - math.sqrt(progress),
}


def constant(step: int, *, total_steps: int, warmup_steps: int) -> float:
    """Warmup, then 1; `total_steps` plays no part."""
    check("scheduler", warmup_steps=warmup_steps)
    return 1.0 if step >= warmup_steps else step / warmup_steps


def linear(step: int, *, total_steps: int, warmup_steps: int, min_lr_ratio: float) -> float:
    """Warmup, then a straight line down to `min_lr_ratio`.

    >>> [linear(step, total_steps=100, warmup_steps=20, min_lr_ratio=0.0) for step in (10, 20, 60, 100)]
    [0.5, 1.0, 0.5, 0.0]
    """
    check("scheduler", warmup_steps=warmup_steps, min_lr_ratio=min_lr_ratio)
    if step < warmup_steps:
        return step / warmup_steps
    remaining = max(0.0, (total_steps - step) / max(1, total_steps - warmup_steps))
    return min_lr_ratio + (1.0 - min_lr_ratio) * remaining


def cosine(step: int, *, total_steps: int, warmup_steps: int, min_lr_ratio: float) -> float:
    """Warmup, then half a cosine down to `min_lr_ratio` (Loshchilov and Hutter 2017, eq. 5, without restarts).

    Past the end it stays down, where transformers and torch let the cosine rise again.

    >>> [round(cosine(step, total_steps=100, warmup_steps=20, min_lr_ratio=0.1), 2) for step in (0, 20, 60, 100)]
    [0.0, 1.0, 0.55, 0.1]
    """
    check("scheduler", warmup_steps=warmup_steps, min_lr_ratio=min_lr_ratio)
    if step < warmup_steps:
        return step / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return min_lr_ratio + (1.0 - min_lr_ratio) * DECAYS["cosine"](progress)


def inverse_sqrt(step: int, *, total_steps: int, warmup_steps: int) -> float:
    """Warmup, then sqrt(warmup_steps / step) (Vaswani et al. 2017, eq. 3); `total_steps` plays no part.

    >>> [inverse_sqrt(step, total_steps=1000, warmup_steps=100) for step in (50, 100, 400)]
    [0.5, 1.0, 0.5]
    """
    check("scheduler", warmup_steps=warmup_steps)
    if step < warmup_steps:
        return step / warmup_steps
    timescale = warmup_steps or 10_000  # without warmup, transformers' scale: the curve needs one
    return math.sqrt(timescale / (step - warmup_steps + timescale))


def step_decay(step: int, *, total_steps: int, warmup_steps: int, step_size: int, gamma: float) -> float:
    """Warmup, then `gamma` times lower after every `step_size` steps; `total_steps` plays no part.

    >>> step_decay(250, total_steps=300, warmup_steps=0, step_size=100, gamma=0.5)
    0.25
    """
    check("scheduler", warmup_steps=warmup_steps, step_size=step_size, gamma=gamma)
    if step < warmup_steps:
        return step / warmup_steps
    return gamma ** ((step - warmup_steps) // step_size)


def wsd(
    step: int, *, total_steps: int, warmup_steps: int, decay_fraction: float, min_lr_ratio: float, decay: str
) -> float:
    """Warmup, stable, decay over the last `decay_fraction` of all steps (Hu et al. 2024; 1-sqrt: Haegele et al. 2024).

    Warmup starts at `min_lr_ratio`, as in transformers, and eats into the decay where both do not fit.

    >>> options = {"warmup_steps": 20, "decay_fraction": 0.2, "min_lr_ratio": 0.0, "decay": "linear"}
    >>> [wsd(step, total_steps=100, **options) for step in (10, 50, 90, 100)]
    [0.5, 1.0, 0.5, 0.0]
    """
    check("scheduler", warmup_steps=warmup_steps, decay_fraction=decay_fraction, min_lr_ratio=min_lr_ratio)
    curve = choose("scheduler.decay", decay, DECAYS)
    decay_steps = min(round(decay_fraction * total_steps), max(0, total_steps - warmup_steps))
    if step < warmup_steps:
        height = step / warmup_steps
    elif step < total_steps - decay_steps:
        height = 1.0
    else:
        height = curve(min(1.0, (step - total_steps + decay_steps) / max(1, decay_steps)))
    return min_lr_ratio + (1.0 - min_lr_ratio) * height
