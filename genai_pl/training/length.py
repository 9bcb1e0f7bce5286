"""Run length: optimizer steps, passes over the data and warmup steps, with defaults that fit the data.

`trainer.max_epochs` wins over `trainer.max_steps`; without either a trained model that learns from examples makes
DEFAULT_PASSES passes, as transformers and TRL do, and any other run DEFAULT_STEPS steps. Warmup is DEFAULT_WARMUP
steps, at most a fifth of the run. One optimizer step is one step here, however many micro-batches or devices it
takes.

A checkpoint stores the length that its run began with, because defaults depend on the data: a resume without a new
length keeps the old one, and its schedule stays the same curve.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

from genai_pl.errors import ConfigError

DEFAULT_STEPS = 500
DEFAULT_PASSES = 3  # of a trained model over examples, as num_train_epochs of transformers and TRL
DEFAULT_WARMUP, WARMUP_SHARE = 100, 5  # at most this many steps, and at most a fifth of the run
BEFORE = {"steps": DEFAULT_STEPS, "warmup_steps": DEFAULT_WARMUP}  # of runs whose checkpoints do not store a length


class Length(NamedTuple):
    """Length of a run.

    steps: optimizer steps. steps_per_pass: those of one pass over the data, None for a stream. is_default: True
    if no option chose it.
    """

    steps: int
    steps_per_pass: int | None
    is_default: bool = False

    @property
    def passes(self) -> float | None:
        """Passes over the data; None for a stream."""
        return None if self.steps_per_pass is None else self.steps / self.steps_per_pass


def check_length(*, max_steps: object, max_epochs: object, warmup_steps: object) -> None:
    """ConfigError for lengths that are no numbers, are too small, or leave the run without an end (`max_steps=-1`
    alone).
    """
    if max_steps == -1 and max_epochs is None:
        raise ConfigError("trainer.max_steps=-1: set it, or trainer.max_epochs")
    numbers = {
        "trainer.max_steps": None if max_steps == -1 else max_steps,
        "trainer.max_epochs": max_epochs,
        "scheduler.warmup_steps": warmup_steps,
    }
    for option, value in numbers.items():
        least = 0 if option == "scheduler.warmup_steps" else 1
        if value is not None and (type(value) is not int or value < least):
            raise ConfigError(f"{option}={value}: expected a number, whole and at least {least}")


def choose_length(
    *,
    max_steps: int | None,
    max_epochs: int | None,
    steps_per_pass: int | None,
    fine_tunes: bool,
    stored: Mapping[str, int | None] | None,
) -> Length:
    """The length of a run; ConfigError for epochs of a stream.

    max_steps, max_epochs: the options of `trainer`, None where they are not set. steps_per_pass: optimizer
    steps of one pass, None for a stream. fine_tunes: True if a trained model learns from examples. stored: the
    length in the checkpoint of a run that is resumed, with "steps" and "warmup_steps".
    """
    # options first, then the checkpoint's length, then a default
    if max_epochs is not None and steps_per_pass is None:
        raise ConfigError("data.streaming=true has no epochs: set trainer.max_steps, not trainer.max_epochs")
    if max_epochs is not None:
        return Length(max_epochs * steps_per_pass, steps_per_pass)
    if max_steps is not None:
        return Length(max_steps, steps_per_pass)
    if stored is not None:
        return Length(int(stored["steps"]), steps_per_pass, is_default=True)
    steps = DEFAULT_PASSES * steps_per_pass if fine_tunes and steps_per_pass else DEFAULT_STEPS
    return Length(steps, steps_per_pass, is_default=True)


def overrun_line(length: Length, step: int, stored: Mapping[str, int | None], *, max_epochs: int | None) -> str | None:
    """A line for a resumed run that is already past its new, shorter length; None for a run within it.

    A run may also be past its own length by itself, when a rollout of several steps began before the end: no
    line then.

    >>> overrun_line(Length(2, 10), 3, {"steps": 3}, max_epochs=None)
    'passed      the run is at step 3, past trainer.max_steps=2: nothing is trained'
    """
    if length.steps >= min(step, stored["steps"]):
        return None
    given = f"trainer.max_steps={length.steps}" if max_epochs is None else f"trainer.max_epochs={max_epochs}"
    return f"passed      the run is at step {step}, past {given}: nothing is trained"


def default_warmup(total_steps: int) -> int:
    """Warmup steps of a run whose `scheduler.warmup_steps` is null.

    >>> default_warmup(500), default_warmup(12), default_warmup(10_000)
    (100, 2, 100)
    """
    return min(DEFAULT_WARMUP, total_steps // WARMUP_SHARE)


def with_warmup(
    schedule: Callable[..., float], total_steps: int, stored: Mapping[str, int | None] | None
) -> Callable[..., float]:
    """The schedule with its default warmup filled in, if it takes `warmup_steps` and has null there.

    stored: the length of a resumed run, whose warmup is kept even if the run became longer: else the learning
    rate would jump.
    """
    if not isinstance(schedule, partial) or schedule.keywords.get("warmup_steps", 0) is not None:
        return schedule
    kept = None if stored is None else stored["warmup_steps"]
    return partial(schedule, warmup_steps=default_warmup(total_steps) if kept is None else int(kept))


def warmup_of(schedule: Callable[..., float]) -> int | None:
    """Warmup steps of a schedule; None where the schedule has no such argument."""
    return schedule.keywords.get("warmup_steps") if isinstance(schedule, partial) else None


def read_stored_length(contents: Mapping[str, object]) -> Mapping[str, int | None]:
    """The "length" of a checkpoint's contents; BEFORE, the defaults of versions that stored none, where it is
    missing or damaged.
    """
    stored = contents.get("length")
    valid = isinstance(stored, dict) and all(v is None or type(v) is int for v in stored.values())
    return {**BEFORE, **stored} if valid else BEFORE


def describe_length(length: Length, warmup: int | None) -> str:
    """One line on steps, passes and warmup.

    >>> describe_length(Length(36, 12, is_default=True), 7)
    'length      36 steps = 3 passes over the data (the default: trainer.max_epochs or max_steps), warmup 7 steps (19%)'
    """
    passes = "" if length.passes is None else f" = {_figure(length.passes)} over the data"
    default = " (the default: trainer.max_epochs or max_steps)" if length.is_default else ""
    line = f"length      {length.steps:,} step{'s' * (length.steps != 1)}{passes}{default}"
    if not warmup:
        return line if warmup is None else f"{line}, no warmup"
    if warmup >= length.steps:
        return f"{line}; warmup {warmup:,} steps: all of it, the learning rate never reaches its peak"
    return f"{line}, warmup {warmup:,} step{'s' * (warmup != 1)} ({warmup / length.steps:.0%})"


def _figure(passes: float) -> str:
    """The number of passes to three digits.

    >>> _figure(1.0), _figure(41.23), _figure(12345.6)
    ('1 pass', '41.2 passes', '12,346 passes')
    """
    number = f"{passes:,.0f}" if passes >= 100 else f"{passes:.3g}"
    return f"{number} pass" if number == "1" else f"{number} passes"
