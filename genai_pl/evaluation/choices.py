"""Questions with several choices: the one that a model finds most likely is its answer."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from genai_pl.data.columns import preview
from genai_pl.errors import DataError
from genai_pl.evaluation.metrics import Metrics, with_interval
from genai_pl.evaluation.windows import ScoredWindow, completion_windows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Question(NamedTuple):
    """What the model reads, what it may go on with, and which of that is right, counted from 0."""

    prompt: str
    choices: list[str]
    answer: int


def read_question(
    place: object, prompt: str, choices: Sequence[str], answer: object, *, number: int | None = None
) -> Question:
    """The question at a place in the data; DataError says what is wrong with it.

    `number` is what an answer that is written as text may stand for beside a letter or a text.
    """
    if len(choices) < 2 or not all(choice.strip() for choice in choices):
        raise DataError(f"{place}: choices must be a list of two or more texts")
    meant = matching_choices(choices, answer) | (set() if number is None else matching_choices(choices, number))
    if not meant:
        raise DataError(
            f"{place}: answer {preview(answer)} is not the number (from 0), letter or text of one of {len(choices)} choices"
        )
    if len(meant) > 1:
        raise DataError(f"{place}: answer {preview(answer)} stands for several choices: give the number of one, from 0")
    return Question(prompt, list(choices), meant.pop())


def read_labelled_question(
    place: object, prompt: str, choices: Sequence[str], labels: Sequence[str], answer: object
) -> Question:
    """The question whose choices have labels, one of which is the answer: as ARC and CommonsenseQA have them."""
    answer = str(answer)
    if len(labels) != len(choices) or len(set(labels)) < len(labels):
        raise DataError(f"{place}: {len(choices)} choices with the labels {preview(list(labels))}: give each its own")
    if answer not in labels:
        raise DataError(f"{place}: answer {preview(answer)} is none of the labels {', '.join(labels)}")
    return read_question(place, prompt, choices, labels.index(answer))


def matching_choices(choices: Sequence[str], answer: object) -> set[int]:
    """Which choices a number, a letter or a text may stand for.

    >>> matching_choices(["red", "blue"], 1), matching_choices(["red", "blue"], "B"), matching_choices(["red", "blue"], "blue")
    ({1}, {1}, {1})
    >>> matching_choices(["red", "blue"], "C")
    set()
    """
    if isinstance(answer, str):
        found = {k for k, choice in enumerate(choices) if choice == answer}
        letter = {ord(answer) - ord("A")} if len(answer) == 1 else set()
        return found | (letter & set(range(len(choices))))
    whole = isinstance(answer, int) and not isinstance(answer, bool)
    return {answer} & set(range(len(choices))) if whole else set()


def choice_windows(
    questions: Sequence[Question], tokenizer: "PreTrainedTokenizerBase", *, seq_len: int, bos: bool | None = None
) -> list[ScoredWindow]:
    """A row for each choice of each question in turn; a space goes before a choice that no whitespace keeps apart."""
    owners, prompts, completions = [], [], []
    for n, (prompt, choices, _) in enumerate(questions, start=1):
        for choice in choices:
            apart = prompt[-1:].isspace() or choice[0].isspace()
            owners.append(n)
            prompts.append(prompt)
            completions.append(choice if apart else f" {choice}")
    return completion_windows(prompts, completions, tokenizer, seq_len=seq_len, bos=bos, owners=owners)


def choice_metrics(nll: Tensor, questions: Sequence[Question]) -> Metrics:
    """Of the loss of each choice of each question in turn: how often the right one has the least, of k equal ones as 1/k.

    accuracy compares log-likelihoods, accuracy_norm those per byte of the choice, both with Wilson's 95 % interval: acc and
    acc_bytes of lm-evaluation-harness. chance: what guessing would give.
    """
    plain, per_byte = [], []
    losses = nll.split([len(question.choices) for question in questions])
    for loss, question in zip(losses, questions, strict=True):
        sizes = torch.tensor([len(choice.encode()) for choice in question.choices])
        plain.append(tie_credit(loss, question.answer))
        per_byte.append(tie_credit(loss / sizes, question.answer))
    n = len(questions)
    return {
        **with_interval("accuracy", sum(plain) / n, n),
        **with_interval("accuracy_norm", sum(per_byte) / n, n),
        "chance": sum(1 / len(question.choices) for question in questions) / n,
    }


def tie_credit(losses: Tensor, answer: int) -> float:
    """1 where the answer alone has the least loss, 1/k where k choices have it, else 0.

    >>> tie_credit(torch.tensor([3.0, 1.0]), 1), tie_credit(torch.tensor([1.0, 1.0]), 1), tie_credit(torch.tensor([1.0, 3.0]), 1)
    (1.0, 0.5, 0.0)
    """
    best = losses == losses.min()
    return (best[answer] / best.sum()).item()
