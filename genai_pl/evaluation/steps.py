"""Scores of steps: the probability of a process reward model that each step of an answer is correct."""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from genai_pl.config.enums import Head
from genai_pl.config.labels import STEP_LABELS, read_labels
from genai_pl.data.prompt_tokens import Messages, Tools
from genai_pl.data.steps import encode_steps
from genai_pl.evaluation.embeddings import BATCH_TOKENS, padded
from genai_pl.evaluation.metrics import Metrics, with_interval
from genai_pl.models import Model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def step_separator(model: Model) -> str | None:
    """The text after each step of a process reward model; None for any other model."""
    config = model.config
    if config.head is not Head.tokens or config.n_labels != len(STEP_LABELS):
        return None
    return read_labels(config.extra, config.n_labels).step_separator


@torch.inference_mode()
def step_scores(
    model: Model,
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str | Messages],
    steps: Sequence[Sequence[str]],
    *,
    separator: str,
    max_length: int,
    tools: Sequence[Tools] | None = None,
    batch_tokens: int = BATCH_TOKENS,
    on_batch: Callable[[int], object] | None = None,
) -> list[list[float]]:
    """The probability that each step is correct, given the prompt and the steps before it.

    A row longer than max_length tokens loses the beginning of its prompt. Where the steps alone are that long, those that end
    beyond the first max_length tokens are scored in further windows, with half a window before the first of them.
    """
    rows, ends_of = [], []
    # windows of all rows, each with the row it is of and the ends of its steps
    for n, (prompt, answer, ends) in enumerate(encode_steps(tokenizer, prompts, steps, separator, tools)):
        room = max_length - len(answer) if len(answer) < max_length else max_length // 2
        kept = prompt[max(len(prompt) - room, 0) :]
        row = np.concatenate([kept, answer])
        for start, stop, window_ends in _windows(len(kept) + ends, max_length):
            rows.append(row[start:stop])
            ends_of.append((n, window_ends - start))
    last = {n: place for place, (n, _) in enumerate(ends_of)}
    # each window's steps, in the order of the windows
    scored: list[list[float]] = [[] for _ in rows]
    for batch, input_ids, segment_ids in padded(model, rows, batch_tokens):
        hidden = model.features(input_ids, segment_ids)
        for place, states in zip(batch, hidden, strict=True):
            logits = model.label_logits(states[torch.from_numpy(ends_of[place][1] - 1).to(states.device)]).float()
            scored[place] = logits.softmax(-1)[:, 1].tolist()
        if on_batch is not None:
            on_batch(sum(last[ends_of[place][0]] == place for place in batch))
    found: list[list[float]] = [[] for _ in steps]
    for (n, _), window in zip(ends_of, scored, strict=True):
        found[n] += window
    return found


def _windows(ends: np.ndarray, size: int) -> Iterator[tuple[int, int, np.ndarray]]:
    """(start, stop, ends of its steps) of the windows of at most `size` tokens in which the steps of a row are scored."""
    start = 0
    while len(ends):
        stop = min(start + size, int(ends[-1]))
        inside = int(np.searchsorted(ends, stop, side="right"))
        if inside:
            yield start, stop, ends[:inside]
        ends = ends[inside:]
        start = int(ends[0]) - size // 2 if len(ends) else stop


def step_metrics(scores: Sequence[Sequence[float]], labels: Sequence[Sequence[float]]) -> Metrics:
    """Accuracy of steps with its interval, recall of incorrect ones, and of whole answers whether the first error is found.

    first_error: the share of answers with an incorrect step of which the first one below one half is the right one.
    clean: the share of answers without one of which no step is below one half (ProcessBench: Zheng et al. 2024, 3.4, has
    the harmonic mean of both as F1). A metric without rows is left out.
    """
    pairs = [
        (ours, label >= 0.5)
        for row, own in zip(scores, labels, strict=True)
        for ours, label in zip(row, own, strict=True)
    ]
    hits = sum((ours >= 0.5) is right for ours, right in pairs)
    metrics = with_interval("accuracy", hits / len(pairs), len(pairs))
    wrong = [ours < 0.5 for ours, right in pairs if not right]
    firsts = [(_first_error(ours), _first_error(own)) for ours, own in zip(scores, labels, strict=True)]
    shares = {
        "recall_incorrect": wrong,
        "first_error": [ours == true for ours, true in firsts if true is not None],
        "clean": [ours is None for ours, true in firsts if true is None],
    }
    means = {name: sum(found) / len(found) for name, found in shares.items() if found}
    if {"first_error", "clean"} <= set(means):
        a, b = means["first_error"], means["clean"]
        means["f1"] = 2 * a * b / (a + b) if a + b else 0.0
    return {**metrics, **means}


def _first_error(values: Sequence[float]) -> int | None:
    """The number of the first value below one half."""
    return next((n for n, value in enumerate(values) if value < 0.5), None)
