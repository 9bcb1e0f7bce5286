"""Multiple choice: the choice with the highest log-likelihood after the question is the model's answer.

Numbers agree with lm-evaluation-harness: `accuracy` is its acc, `accuracy_norm` its acc_bytes, which divides by the bytes
of a choice because long choices are unlikely whatever they say.
"""

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
    """A question with choices.

    prompt: text in front of the choice. choices: two or more texts. answer: index of the right one, from 0.
    """

    prompt: str
    choices: list[str]
    answer: int


def read_question(
    place: object, prompt: str, choices: Sequence[str], answer: object, *, number: int | None = None
) -> Question:
    """The question of a row; DataError for choices or an answer that are ambiguous or missing.

    place: the row, for errors. answer: an index, a letter or the text of a choice.
    number: an index that an answer written as text may also stand for (csv has no numbers).
    """
    if len(choices) < 2 or not all(choice.strip() for choice in choices):
        raise DataError(f"{place}: choices must be a list of two or more texts")
    matches = matching_choices(choices, answer) | (set() if number is None else matching_choices(choices, number))
    if not matches:
        raise DataError(
            f"{place}: answer {preview(answer)} is not the number (from 0), letter or text of one of {len(choices)} choices"
        )
    if len(matches) > 1:
        raise DataError(f"{place}: answer {preview(answer)} stands for several choices: give the number of one, from 0")
    return Question(prompt, list(choices), matches.pop())


def read_labelled_question(
    place: object, prompt: str, choices: Sequence[str], labels: Sequence[str], answer: object
) -> Question:
    """The question whose choices have labels, one of which is the answer (ARC, CommonsenseQA)."""
    answer = str(answer)
    if len(labels) != len(choices) or len(set(labels)) < len(labels):
        raise DataError(f"{place}: {len(choices)} choices with the labels {preview(list(labels))}: give each its own")
    if answer not in labels:
        raise DataError(f"{place}: answer {preview(answer)} is none of the labels {', '.join(labels)}")
    return read_question(place, prompt, choices, labels.index(answer))


def matching_choices(choices: Sequence[str], answer: object) -> set[int]:
    """Indices of the choices that a number, a letter or a text may stand for; several where the data are ambiguous.

    >>> matching_choices(["red", "blue"], 1), matching_choices(["red", "blue"], "B"), matching_choices(["red", "blue"], "blue")
    ({1}, {1}, {1})
    >>> matching_choices(["red", "blue"], "C")
    set()
    """
    if isinstance(answer, str):
        equal = {k for k, choice in enumerate(choices) if choice == answer}
        letter = {ord(answer) - ord("A")} if len(answer) == 1 else set()
        return equal | (letter & set(range(len(choices))))
    is_index = isinstance(answer, int) and not isinstance(answer, bool)
    return {answer} & set(range(len(choices))) if is_index else set()


def choice_windows(
    questions: Sequence[Question], tokenizer: "PreTrainedTokenizerBase", *, seq_len: int, bos: bool | None = None
) -> list[ScoredWindow]:
    """One window per choice of each question, in order; a space separates prompt and choice where neither has white space."""
    owners, prompts, completions = [], [], []
    for n, (prompt, choices, _) in enumerate(questions, start=1):
        for choice in choices:
            separated = prompt[-1:].isspace() or choice[0].isspace()
            owners.append(n)
            prompts.append(prompt)
            completions.append(choice if separated else f" {choice}")
    return completion_windows(prompts, completions, tokenizer, seq_len=seq_len, bos=bos, owners=owners)


def choice_metrics(nll: Tensor, questions: Sequence[Question]) -> Metrics:
    """Accuracy over questions, from the losses (total choices,) of all choices in order.

    accuracy compares log-likelihoods, accuracy_norm those per byte of the choice, both with Wilson's 95 % interval; chance
    is the expected accuracy of guessing.
    """
    plain, per_byte = [], []
    losses = nll.split([len(question.choices) for question in questions])
    for loss, question in zip(losses, questions, strict=True):
        # bytes of the choice without the space that separates it
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
    """1 if the answer alone has the lowest loss, 1/k if k choices share it, else 0.

    >>> tie_credit(torch.tensor([3.0, 1.0]), 1), tie_credit(torch.tensor([1.0, 1.0]), 1), tie_credit(torch.tensor([1.0, 3.0]), 1)
    (1.0, 0.5, 0.0)
    """
    best = losses == losses.min()
    return (best[answer] / best.sum()).item()
