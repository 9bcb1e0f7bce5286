"""The rows that a model is measured on: what kind they are is told by their columns."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from itertools import count, islice
from typing import NamedTuple

from genai_pl.data import sources
from genai_pl.data.columns import Place, list_of, text_of
from genai_pl.data.messages import Given, Message, given_of, messages_of, split_answers, tools_of
from genai_pl.errors import DataError
from genai_pl.evaluation.choices import Question, read_question

log = logging.getLogger(__name__)


class Conversation(NamedTuple):
    """Messages, of which what assistants say after the first `n_given` is scored, and the tools that they may call."""

    messages: list[Message]
    n_given: int
    tools: list[Message]


class Kind(Enum):
    """What rows are, and the columns by which that is known."""

    preferences = ("prompt", "chosen", "rejected")
    choices = ("prompt", "choices", "answer")
    questions = ("question", "choices", "answer")
    conversations = ("messages", "tools")  # tools where there are some
    completions = ("prompt", "completion")
    text = ("text",)


def read_examples(
    path: str, *, column: str | None = None, last_word: bool = False, limit: int | None = None
) -> tuple[Kind, list[list]]:
    """The kind of the first `limit` rows, and their columns: those of the kind, or one of `Question`s.

    `column` names the column of a text. With `last_word` a text becomes a prompt and its last word the completion.
    """
    source = sources.shipped_validation(path) or sources.find(path)
    found = sources.column_names(source)
    if column is None and not last_word:
        kind = find_kind(path, found)
        names = [name for name in kind.value if name in found]
    else:
        kind, names = Kind.text, [column or "text"]
        sources.check_columns(source, found, {"data.column": names[0]})
    read = READ[kind]
    rows = [
        read(place, [row.get(name) for name in names], names)
        for place, row in islice(sources.rows(source, names), limit)
    ]
    if not rows:
        raise DataError(f"data.path={path}: no rows")
    if kind in (Kind.questions, Kind.choices):
        return Kind.choices, [rows]
    columns = [list(column) for column in zip(*rows, strict=True)]
    if kind is Kind.completions and not isinstance(columns[0][0], str):
        with naming(path):
            return Kind.conversations, [[*map(_continued, count(1), *columns)]]
    if last_word:
        with naming(path):
            return Kind.completions, last_words(columns[0])
    if kind is Kind.text and (empty := [n for n, text in enumerate(columns[0], start=1) if not text]):
        log.warning("data        %s of %s texts are empty, first row %s", len(empty), len(rows), empty[0])
    return kind, columns


def read_texts(place: Place, cells: Sequence[object], names: Sequence[str]) -> list[str]:
    """The texts of a row."""
    return [text_of(cell, place._replace(column=name)) for cell, name in zip(cells, names, strict=True)]


def read_pair(place: Place, cells: Sequence[object], names: Sequence[str]) -> list[Given]:
    """Prompt, chosen and rejected answer of a row, as in training."""
    prompt, *answers = [given_of(cell, place._replace(column=name)) for cell, name in zip(cells, names, strict=True)]
    prompt, answers = split_answers(prompt, answers, place)
    return [prompt, *answers]


def read_conversation(place: Place, cells: Sequence[object], names: Sequence[str]) -> list[Conversation]:
    """The conversation of a row."""
    messages = messages_of(cells[0], place._replace(column=names[0]))
    return [Conversation(messages, 0, tools_of(cells[1], place._replace(column=names[1])) if len(cells) > 1 else [])]


def read_completion(place: Place, cells: Sequence[object], names: Sequence[str]) -> list[Given]:
    """Prompt and completion of a row: texts, or the messages of both."""
    prompt, said = (given_of(cell, place._replace(column=name)) for cell, name in zip(cells, names, strict=True))
    prompt, (said,) = split_answers(prompt, [said], place)
    return [prompt, said]


def read_choice(place: Place, cells: Sequence[object], names: Sequence[str]) -> Question:
    """The question of a row, which is asked as ARC is where it is called that."""
    question, choices, answer = cells
    question = text_of(question, place._replace(column=names[0]))
    asked = f"Question: {question}\nAnswer:" if names[0] == "question" else question
    choices = list_of(choices, place._replace(column=names[1]), text_of)
    if place.name.lower().endswith(".csv") and isinstance(answer, str):  # all cells of a csv are texts
        return read_question(place, asked, choices, answer, number=int(answer) if answer.isdecimal() else None)
    return read_question(place, asked, choices, answer)


def _continued(n: int, prompt: Given, said: Given) -> Conversation:
    """The conversation of row n, of which the prompt is given."""
    if isinstance(prompt, str):
        raise DataError(f"row {n}: the prompt of the first row is messages, this one a text: give all the same way")
    answer = [{"role": "assistant", "content": said}] if isinstance(said, str) else said
    return Conversation([*prompt, *answer], len(prompt), [])


READ = {
    Kind.preferences: read_pair,
    Kind.choices: read_choice,
    Kind.questions: read_choice,
    Kind.conversations: read_conversation,
    Kind.completions: read_completion,
    Kind.text: read_texts,
}


def find_kind(path: str, found: Sequence[str]) -> Kind:
    """The first kind whose columns are all there; DataError names what is."""
    for kind in Kind:
        if {*kind.value} - {"tools"} <= set(found):
            return kind
    raise DataError(
        f"data.path={path}: no column 'text', nor 'prompt' and 'completion'; found: {', '.join(found)} (set data.column)"
    )


def last_words(texts: Sequence[str]) -> list[list[str]]:
    """Each text up to its last word, and that with the whitespace before it (LAMBADA: Paperno et al. 2016).

    >>> last_words(["I met him at the docks"])
    [['I met him at the'], [' docks']]
    """
    prompts = []
    for n, text in enumerate(texts, start=1):
        words = text.split()
        if len(words) < 2:
            raise DataError(f"row {n}: {len(words)} words; there is nothing to predict the last one from")
        prompts.append(text.rstrip()[: -len(words[-1])].rstrip())
    return [prompts, [text.rstrip()[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]]


@contextmanager
def naming(path: str) -> Iterator[None]:
    """Puts the option in front of what is wrong with a row."""
    try:
        yield
    except DataError as error:
        raise DataError(f"data.path={path}: {error}") from None
