"""Scores of steps: the probability of a process reward model that each step of an answer is correct."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from genai_pl.config.enums import Head
from genai_pl.config.labels import STEP_LABELS, read_labels
from genai_pl.data.prompt_tokens import Messages, Tools
from genai_pl.data.stepwise import encode_steps
from genai_pl.errors import DataError
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

    Prompts lose their beginning where a row is longer than max_length tokens; DataError for steps longer than that.
    """
    rows, ends = [], []
    for n, (prompt, answer, answer_ends) in enumerate(
        encode_steps(tokenizer, prompts, steps, separator, tools), start=1
    ):
        if len(answer) >= max_length:
            raise DataError(
                f"row {n}: the steps of an answer have {len(answer)} tokens, and the process reward model reads {max_length}"
            )
        kept = prompt[max(len(prompt) + len(answer) - max_length, 0) :]
        rows.append(np.concatenate([kept, answer]))
        ends.append(len(kept) + answer_ends)
    found: list[list[float]] = [[] for _ in rows]
    for batch, input_ids, segment_ids in padded(model, rows, batch_tokens):
        hidden = model.features(input_ids, segment_ids)
        for n, states in zip(batch, hidden, strict=True):
            logits = model.label_logits(states[torch.from_numpy(ends[n] - 1).to(states.device)]).float()
            found[n] = logits.softmax(-1)[:, 1].tolist()
        if on_batch is not None:
            on_batch(len(batch))
    return found


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
