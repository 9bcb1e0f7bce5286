"""Bounds of options: what a value must be beyond its type, with the words that say so in an error.

BOUNDS lists options of untyped YAML groups and those whose range matters to more than one function. Arguments of a
`_target_` that are not listed are bounded by their type hints (`bound_of`). A bound describes what can work at all;
what cannot work together is checked where the parts meet.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from types import UnionType
from typing import Literal, NamedTuple, Union, get_args, get_origin

from genai_pl.config.values import MAX_SIZE
from genai_pl.object_storage import is_remote


class Bound(NamedTuple):
    """A condition on one value.

    expected: the condition in words, after "expected". accepts: True for a value that meets it.
    """

    expected: str
    accepts: Callable[[object], bool]


def integer(least: int, most: int = MAX_SIZE) -> Bound:
    """A whole number from `least` to `most`. Floats and bools are refused: 1.0 as a step count is a mistake.

    >>> integer(1).expected, integer(1).accepts(3), integer(1).accepts(3.0), integer(0).accepts(True)
    ('a whole number of at least 1', True, False, False)
    """
    expected = f"a whole number of at least {least}"
    expected += "" if most == MAX_SIZE else f" and at most {most:,}"
    return Bound(expected, lambda value: type(value) is int and least <= value <= most)


def real(least: float, most: float = math.inf, *, exclusive: bool = False) -> Bound:
    """A finite number from `least` to `most`; with exclusive=True above `least`."""
    expected = f"a number {'above' if exclusive else 'of at least'} {least}" + (
        "" if most == math.inf else f", at most {most}"
    )
    return Bound(
        expected, lambda value: _is_finite(value) and (least < value if exclusive else least <= value) and value <= most
    )


def choice(*choices: str) -> Bound:
    """One of a few words."""
    return Bound(f"one of {', '.join(choices)}", lambda value: isinstance(value, str) and value in choices)


def any_of(*bounds: Bound) -> Bound:
    """What at least one of the bounds accepts; their words are joined by "or"."""
    return Bound(" or ".join(b.expected for b in bounds), lambda value: any(b.accepts(value) for b in bounds))


def list_of(item: Bound) -> Bound:
    """A list whose every item the bound accepts. A text is no list, although Python iterates it."""
    return Bound(
        f"a list, each {item.expected}",
        lambda value: isinstance(value, Sequence) and not isinstance(value, str) and all(map(item.accepts, value)),
    )


TEXT = Bound("text", lambda value: isinstance(value, str))
NULL = Bound("null", lambda value: value is None)
FLAG = Bound("true or false", lambda value: isinstance(value, bool))
FIELDS = Bound("fields", lambda value: isinstance(value, Mapping))
SOURCES = Bound(
    "names with options each, such as {web: {path: web.txt}}, or null",
    lambda value: value is None or (isinstance(value, Mapping) and all(isinstance(v, Mapping) for v in value.values())),
)
NAME_OR_NAMES = any_of(NULL, TEXT, list_of(TEXT))
COUNT, COUNT_OR_NULL = integer(1), any_of(integer(1), NULL)
MAX_STEPS = Bound("a number, whole and at least 1", lambda value: type(value) is int and (value == -1 or value >= 1))
POSITIVE_OR_NULL = any_of(real(0, exclusive=True), NULL)

LOSS_WEIGHTS = (  # of parts of a loss or a reward
    *(
        "z_loss",
        "desirable_weight",
        "undesirable_weight",
        "nll_coef",
        "target_margin",
        "centering",
        "missing_eos_penalty",
    ),
    *("beta", "kl_coef", "value_coef", "entropy_coef"),
)

BOUNDS: dict[str, Bound] = {
    "seed": integer(0, 2**32 - 1),  # NumPy takes no larger one
    "data.seq_len": COUNT_OR_NULL,
    "data.batch_size": COUNT,
    "data.val_batch_size": COUNT_OR_NULL,
    "data.workers": integer(0, 1024),
    "data.block_rows": COUNT,
    "data.val_documents": COUNT,
    "data.max_prompt_len": COUNT,
    "data.sources": SOURCES,
    "data.mix_by": choice("tokens", "examples"),
    "data.mix_temperature": real(0, exclusive=True),
    "tokenizer.kind": choice("bpe", "byte", "pretrained"),
    "tokenizer.vocab_size": COUNT,
    "tokenizer.name": TEXT,
    "precision.lightning": TEXT,
    "precision.matmul": choice("auto", "highest", "high", "medium"),
    "precision.float8": FLAG,
    "strategy.lightning": TEXT,
    **{f"objective.{name}": real(0, 1) for name in ("label_smoothing", "gamma", "gae_lambda")},
    **{f"objective.{name}": real(0) for name in ("temperature", "sampling_temperature")},  # 0: greedy
    "objective.tool_timeout": real(0, exclusive=True),  # at 0 every call fails
    **{f"objective.{name}": real(0) for name in LOSS_WEIGHTS},
    **{f"objective.{name}": real(0, exclusive=True) for name in ("clip_range", "value_clip_range", "kl_horizon")},
    **{f"objective.{name}": POSITIVE_OR_NULL for name in ("clip_range_high", "kl_target")},
    "scheduler.warmup_steps": any_of(integer(0), NULL),
    "trainer.max_steps": any_of(MAX_STEPS, NULL),
    "trainer.grace_period": real(0, exclusive=True),
    "trainer.max_epochs": COUNT_OR_NULL,
    "trainer.accumulate_grad_batches": COUNT,
    "trainer.gradient_clip_val": any_of(real(0), NULL),
    "trainer.log_every_n_steps": COUNT,
    "trainer.val_check_interval": COUNT,
    "trainer.limit_val_batches": real(0),
    "trainer.accelerator": TEXT,
    "trainer.devices": any_of(integer(-1), TEXT, list_of(integer(0))),
    "trainer.num_nodes": COUNT,
    "trainer.recompute": any_of(choice("full", "selective"), NULL),
    "trainer.recompute_every": COUNT_OR_NULL,
    "trainer.optimizer_in_backward": FLAG,
    "callbacks.checkpoint.every_n_steps": COUNT_OR_NULL,
    "callbacks.checkpoint.every_n_minutes": POSITIVE_OR_NULL,
    **{
        f"callbacks.{name}": any_of(TEXT, NULL)
        for name in ("checkpoint.best", "checkpoint.dirpath", "early_stopping.metric")
    },
    **{f"callbacks.{name}.mode": any_of(choice("min", "max"), NULL) for name in ("checkpoint", "early_stopping")},
    "callbacks.early_stopping.patience": COUNT_OR_NULL,
    "callbacks.early_stopping.min_delta": real(0),
    "callbacks.checkpoint.keep": COUNT,
    "callbacks.checkpoint.dirpath": any_of(Bound("an address such as s3://BUCKET/RUN", is_remote), NULL),
    "callbacks.samples.every_n_steps": COUNT_OR_NULL,
    "callbacks.samples.prompts": any_of(list_of(TEXT), NULL),
    "callbacks.samples.max_new_tokens": COUNT,
    "callbacks.notify.url": any_of(TEXT, NULL),
    "callbacks.notify.timeout": real(0, exclusive=True),
    "callbacks.notify.bell": FLAG,
    "callbacks.export": any_of(FLAG, choice("last", "best")),
    "callbacks.extra": FIELDS,
    "eval.every_n_steps": COUNT_OR_NULL,
    "eval.tasks": FIELDS,
    "eval.limit": COUNT_OR_NULL,
    "eval.batch_tokens": COUNT,
    "eval.execute_code": FLAG,
    "logger": any_of(list_of(FIELDS), NULL),
    **{f"plan.{name}": POSITIVE_OR_NULL for name in ("bf16", "fp8", "tf32", "fp32", "memory", "link", "network")},
    "plan.per_node": COUNT,
    "plan.efficiency": real(0, 1, exclusive=True),
    "adapter": any_of(NULL, TEXT, list_of(TEXT), FIELDS),
    "adapter_weights": any_of(NULL, list_of(real(-math.inf))),
    "tasks": NAME_OR_NAMES,
    "max_length": COUNT_OR_NULL,
}


def bound_of(hint: object) -> Bound:
    """The bound that a type hint implies, for unions, literals and sequences too; hints of other classes accept
    anything.

    >>> bound_of(int | None).expected, bound_of(list[str]).expected
    ('a whole number or null', 'a list, each text')
    """
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any_of(*map(bound_of, parts))
    if origin is Literal:
        return choice(*map(str, parts))
    if origin in (list, Sequence):
        return list_of(bound_of(parts[0]))
    if origin is tuple:
        return list_of(any_of(*(bound_of(part) for part in parts if part is not Ellipsis)))
    return BOUNDS_OF_TYPES.get(origin or hint, ANYTHING)


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


ANYTHING = Bound("anything", lambda value: True)
BOUNDS_OF_TYPES: dict[object, Bound] = {
    bool: FLAG,
    int: Bound("a whole number", lambda value: type(value) is int and abs(value) <= MAX_SIZE),
    float: Bound("a number", _is_finite),
    str: TEXT,
    type(None): NULL,
    dict: FIELDS,
    Mapping: FIELDS,
    list: list_of(ANYTHING),
}
