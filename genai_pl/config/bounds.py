"""Bounds of options: what each may be, beyond the types that the configuration itself keeps."""

import math
from collections.abc import Callable, Mapping, Sequence
from types import UnionType
from typing import Literal, NamedTuple, Union, get_args, get_origin

from genai_pl.config.values import MAX_SIZE


class Bound(NamedTuple):
    """What a value must be, in words, and whether one is."""

    words: str
    holds: Callable[[object], bool]


def whole(least: int, most: int = MAX_SIZE) -> Bound:
    """A whole number between these."""
    words = f"a whole number of at least {least}"
    words += "" if most == MAX_SIZE else f" and at most {most:,}"
    return Bound(words, lambda value: type(value) is int and least <= value <= most)


def number(least: float, most: float = math.inf, *, above: bool = False) -> Bound:
    """A finite number of at least (or above) one and at most another."""
    words = f"a number {'above' if above else 'of at least'} {least}" + (
        "" if most == math.inf else f", at most {most}"
    )
    return Bound(
        words, lambda value: _is_finite(value) and (least < value if above else least <= value) and value <= most
    )


def one_of(*choices: str) -> Bound:
    """One of these words."""
    return Bound(f"one of {', '.join(choices)}", lambda value: isinstance(value, str) and value in choices)


def either(*bounds: Bound) -> Bound:
    """What one of them lets pass."""
    return Bound(" or ".join(b.words for b in bounds), lambda value: any(b.holds(value) for b in bounds))


def many(of: Bound) -> Bound:
    """A list of such values."""
    return Bound(
        f"a list, each {of.words}",
        lambda value: isinstance(value, Sequence) and not isinstance(value, str) and all(map(of.holds, value)),
    )


TEXT = Bound("text", lambda value: isinstance(value, str))
NULL = Bound("null", lambda value: value is None)
FLAG = Bound("true or false", lambda value: isinstance(value, bool))
FIELDS = Bound("fields", lambda value: isinstance(value, Mapping))
NAMES = either(NULL, TEXT, many(TEXT))
COUNT, COUNT_OR_NULL = whole(1), either(whole(1), NULL)
STEPS = Bound("a number, whole and at least 1", lambda value: type(value) is int and (value == -1 or value >= 1))
RATE = either(number(0, above=True), NULL)

WEIGHTS = (  # of parts of a loss or a reward
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
    "seed": whole(0, 2**32 - 1),  # NumPy takes no larger one
    "data.seq_len": COUNT_OR_NULL,
    "data.batch_size": COUNT,
    "data.val_batch_size": COUNT_OR_NULL,
    "data.workers": whole(0, 1024),
    "data.block_rows": COUNT,
    "data.val_documents": COUNT,
    "data.max_prompt_len": COUNT,
    "tokenizer.kind": one_of("bpe", "byte", "pretrained"),
    "tokenizer.vocab_size": COUNT,
    "tokenizer.name": TEXT,
    "precision.lightning": TEXT,
    "precision.matmul": one_of("highest", "high", "medium"),
    "precision.float8": FLAG,
    "strategy.lightning": TEXT,
    **{f"objective.{name}": number(0, 1) for name in ("label_smoothing", "gamma", "gae_lambda")},
    "objective.temperature": number(0),  # 0: greedy
    **{f"objective.{name}": number(0) for name in WEIGHTS},
    **{f"objective.{name}": number(0, above=True) for name in ("clip_range", "value_clip_range", "kl_horizon")},
    **{f"objective.{name}": RATE for name in ("clip_range_high", "kl_target")},
    "scheduler.warmup_steps": either(whole(0), NULL),
    "trainer.max_steps": either(STEPS, NULL),
    "trainer.grace_period": number(0, above=True),
    "trainer.max_epochs": COUNT_OR_NULL,
    "trainer.accumulate_grad_batches": COUNT,
    "trainer.gradient_clip_val": either(number(0), NULL),
    "trainer.log_every_n_steps": COUNT,
    "trainer.val_check_interval": COUNT,
    "trainer.limit_val_batches": number(0),
    "trainer.accelerator": TEXT,
    "trainer.devices": either(whole(-1), TEXT, many(whole(0))),
    "trainer.num_nodes": COUNT,
    "trainer.recompute": either(one_of("full", "selective"), NULL),
    "trainer.recompute_every": COUNT_OR_NULL,
    "trainer.optimizer_in_backward": FLAG,
    "callbacks.checkpoint.every_n_steps": COUNT,
    "callbacks.checkpoint.keep": COUNT,
    "callbacks.samples.every_n_steps": COUNT_OR_NULL,
    "callbacks.samples.prompts": either(many(TEXT), NULL),
    "callbacks.samples.max_new_tokens": COUNT,
    "callbacks.export": FLAG,
    "callbacks.extra": FIELDS,
    "logger": either(many(FIELDS), NULL),
    **{f"plan.{name}": RATE for name in ("bf16", "fp8", "tf32", "fp32", "memory", "link", "network")},
    "plan.per_node": COUNT,
    "plan.efficiency": number(0, 1, above=True),
    "adapter": either(NULL, TEXT, many(TEXT), FIELDS),
    "adapter_weights": either(NULL, many(number(-math.inf))),
    "tasks": NAMES,
    "max_length": COUNT_OR_NULL,
}


def bound_of(hint: object) -> Bound:
    """What the type hint of an argument lets pass; of a hint that is no plain type, everything."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return either(*map(bound_of, parts))
    if origin is Literal:
        return one_of(*map(str, parts))
    if origin in (list, Sequence):
        return many(bound_of(parts[0]))
    if origin is tuple:
        return many(either(*(bound_of(part) for part in parts if part is not Ellipsis)))
    return PLAIN.get(origin or hint, ANYTHING)


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


ANYTHING = Bound("anything", lambda value: True)
PLAIN: dict[object, Bound] = {
    bool: FLAG,
    int: Bound("a whole number", lambda value: type(value) is int and abs(value) <= MAX_SIZE),
    float: Bound("a number", _is_finite),
    str: TEXT,
    type(None): NULL,
    dict: FIELDS,
    Mapping: FIELDS,
    list: many(ANYTHING),
}
