"""Reward function calls: one score for each completion, and one-line errors for failing functions.

A reward function is called as TRL calls it: prompts, completions and the columns of the data by keyword, a list of
numbers or Nones back. It may be a coroutine function; several such rewards then wait at the same time.
"""

import asyncio
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet

import numpy as np
import torch

from genai_pl.environments.user_code import OneLineErrors, event_loop, not_ending
from genai_pl.errors import ConfigError


def call(
    names: Sequence[str],
    rewards: Sequence[Callable[..., object]],
    prompts: Sequence[str],
    completions: Sequence[str],
    columns: Mapping[str, Sequence[object]],
) -> list[object]:
    """The raw results of all reward functions; coroutines are awaited concurrently.

    names: of the functions, for error messages
    prompts, completions: N texts each
    columns: N values of each further column of the data
    """
    # start all: plain functions run here, one after the other, coroutines in the event loop
    results, awaited = [], {}
    for n, (name, function) in enumerate(zip(names, rewards, strict=True)):
        with OneLineErrors(f"objective.reward={name}"):
            results.append(_call(function, prompts, completions, columns))
        if inspect.isawaitable(results[n]):
            awaited[n] = asyncio.run_coroutine_threadsafe(not_ending(results[n]), event_loop())
    # wait for the coroutines
    for n, future in awaited.items():
        with OneLineErrors(f"objective.reward={names[n]}"):
            results[n] = future.result()
            if isinstance(results[n], SystemExit):
                raise results[n]
    return results


def _call(
    function: Callable[..., object],
    prompts: Sequence[str],
    completions: Sequence[str],
    columns: Mapping[str, Sequence[object]],
) -> object:
    """The result of a reward function, called by keyword as TRL does; one with other parameter names, by position."""
    named = {"prompts": prompts, "completions": completions}
    if _by_keyword(function, {**named, **columns}):
        return function(**named, **columns)
    return function(prompts, completions, **columns)


def _by_keyword(function: Callable[..., object], keywords: Mapping[str, object]) -> bool:
    """Whether to call a function by keyword.

    It is if its signature names prompts or completions, or has them in another order than ours, and takes these
    keywords.
    """
    try:
        # a decorated function shows the names of what it wraps, and must itself take them too
        signature, own_signature = (inspect.signature(function, follow_wrapped=follow) for follow in (True, False))
    except (TypeError, ValueError):
        return False
    ordered = [p.name for p in signature.parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if ordered[:1] == ["completions"] or ordered[1:2] == ["prompts"]:
        return True
    names = {p.name for p in signature.parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    columns = {name: values for name, values in keywords.items() if name not in ("prompts", "completions")}
    named = not names.isdisjoint(("prompts", "completions")) or not _binds(signature, None, None, **columns)
    return named and _binds(signature, **keywords) and _binds(own_signature, **keywords)


def _binds(signature: inspect.Signature, /, *arguments: object, **keywords: object) -> bool:
    try:
        signature.bind(*arguments, **keywords)
    except TypeError:
        return False
    return True


def numbers(name: str, result: object, prompts: Sequence[str]) -> list[float | None]:
    """One float for each completion, or None where the reward does not apply; ConfigError names the reward and the row.

    Accepts lists, tensors and arrays (n,) or (n, 1), with entries that are numbers, bools, or hold a single number.
    """
    n = len(prompts)
    if isinstance(result, torch.Tensor | np.ndarray):
        shape = tuple(result.shape)
        values = result.reshape(n).tolist() if shape in ((n,), (n, 1)) else None
    elif result is None or isinstance(result, str | bytes | Mapping | AbstractSet) or not hasattr(result, "__iter__"):
        raise ConfigError(
            f"objective.reward gave {_shown(result)} for {n} completions ({name}): give a list of numbers"
        )
    else:
        with OneLineErrors(f"objective.reward={name}"):
            values = list(result)
        shape = (len(values),)
    if values is None or len(values) != n:
        raise ConfigError(f"objective.reward gave {shape} numbers for {n} completions ({name}): give one for each")
    return [_number(name, value, row, prompts[row]) for row, value in enumerate(values)]


def _number(name: str, value: object, row: int, prompt: str) -> float | None:
    """One entry as a finite float or None."""
    if value is None:
        return None
    if isinstance(value, Sequence | torch.Tensor | np.ndarray) and not isinstance(value, str | bytes):
        flat = torch.as_tensor(value).flatten().tolist() if not isinstance(value, Sequence) else list(value)
        value = flat[0] if len(flat) == 1 else value
    if not isinstance(value, bool | int | float | np.integer | np.floating | np.bool_) or not _is_finite(value):
        raise ConfigError(
            f"objective.reward={name}: {_shown(value)} for completion {row} (prompt {_shown(prompt)}); give a finite "
            "number, or None where the reward does not apply"
        )
    return float(value)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an int that no float holds
        return False


def _shown(value: object) -> str:
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # Python writes no int of more than 4300 digits
        text = f"{type(value).__name__} of too many digits"
    return text if len(text) <= 60 else f"{text[:57]}..."
