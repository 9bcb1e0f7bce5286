"""The rows that a model is measured on: what kind they are is told by their columns."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
from itertools import count, islice
from typing import NamedTuple

from genai_pl.data import sources
from genai_pl.data.columns import Place, parse_json, parse_list, parse_text
from genai_pl.data.messages import (
    Message,
    TextOrMessages,
    extract_prompt,
    parse_messages,
    parse_tools,
    prepend_system,
    text_or_messages,
)
from genai_pl.data.messages_datamodule import CONTEXT, INPUT, INSTRUCTION, OUTPUT, parse_prompt
from genai_pl.data.records import Record
from genai_pl.errors import DataError
from genai_pl.evaluation.choices import Question, read_labelled_question, read_question

log = logging.getLogger(__name__)


class Conversation(NamedTuple):
    """Messages, of which what assistants say after the first `n_prompt` is scored, and the tools that they may call."""

    messages: list[Message]
    n_prompt: int
    tools: list[Message]


OPTIONAL = {"tools", "system", INPUT, CONTEXT}


class Kind(Enum):
    """What rows are, and the columns by which that is known, beside those that may be there."""

    preferences = ("prompt", "chosen", "rejected", "tools", "system")
    choices = ("prompt", "choices", "answer")
    questions = ("question", "choices", "answer")
    labelled = ("question", "choices", "answerKey")  # ARC on the hub
    conversations = ("messages", "tools", "system")
    completions = ("prompt", "completion", "tools", "system")
    pairs = ("chosen", "rejected", "tools", "system")  # preferences that begin with their prompt
    share_gpt = ("conversations", "tools", "system")  # ShareGPT
    instructions = (INSTRUCTION, OUTPUT, INPUT, CONTEXT)  # Alpaca
    text = ("text",)


CANONICAL_KINDS = {Kind.questions: Kind.choices, Kind.labelled: Kind.choices, Kind.pairs: Kind.preferences}
CANONICAL_KINDS |= {Kind.share_gpt: Kind.conversations, Kind.instructions: Kind.completions}


def read_examples(
    path: str, *, column: str | None = None, last_word: bool = False, limit: int | None = None
) -> tuple[Kind, list[list]]:
    """The kind of the first `limit` rows, and their columns: those of the kind, or one of `Question`s.

    `column` names the column of a text. With `last_word` a text becomes a prompt and its last word the completion.
    """
    source = sources.shipped_validation(path) or sources.find_source(path)
    found = sources.column_names(source)
    if column is None and not last_word:
        kind = find_kind(path, found)
        names = [name for name in kind.value if name in found]
    else:
        kind, names = Kind.text, [column or "text"]
        sources.check_columns(source, found, {"data.column": names[0]})
    read = READERS[kind]
    rows = [
        read(place, {name: row.get(name) for name in names})
        for place, row in islice(sources.read_records(source, names), limit)
    ]
    if not rows:
        raise DataError(f"data.path={path}: no rows")
    kind = CANONICAL_KINDS.get(kind, kind)
    if kind is Kind.choices:
        return kind, [rows]
    columns = [list(column) for column in zip(*rows, strict=True)]
    if kind is Kind.completions:
        if isinstance(columns[0][0], str):
            return kind, columns[:2]
        with name_path_in_errors(path):
            return Kind.conversations, [[*map(_given_conversation, count(1), *columns)]]
    if last_word:
        with name_path_in_errors(path):
            return Kind.completions, split_last_words(columns[0])
    if kind is Kind.text and (empty := [n for n, text in enumerate(columns[0], start=1) if not text]):
        log.warning("data        %s of %s texts are empty, first row %s", len(empty), len(rows), empty[0])
    return kind, columns


def read_texts(place: Place, row: Record) -> list[str]:
    """The texts of a row."""
    return [parse_text(cell, place._replace(column=name)) for name, cell in row.items()]


def read_pair(place: Place, row: Record) -> list[TextOrMessages]:
    """Prompt, chosen and rejected answer of a row, as in training, and the tools that may be called in it."""
    return _split_answers(place, row, "chosen", "rejected")


def read_conversation(place: Place, row: Record) -> list[Conversation]:
    """The conversation of a row."""
    name = "messages" if "messages" in row else "conversations"
    messages = prepend_system(
        parse_messages(row[name], place._replace(column=name)), row.get("system"), place._replace(column="system")
    )
    return [Conversation(messages, 0, parse_tools(row.get("tools"), place._replace(column="tools")))]


def read_completion(place: Place, row: Record) -> list[TextOrMessages]:
    """Prompt and completion of a row, texts or the messages of both, and the tools that may be called in it."""
    return _split_answers(place, row, "completion" if "completion" in row else OUTPUT)


def _split_answers(place: Place, row: Record, *columns: str) -> list[TextOrMessages]:
    """The prompt of a row, if it has one, and its answers."""
    asked = next((name for name in ("prompt", INSTRUCTION) if name in row), None)
    answers = [text_or_messages(row[name], place._replace(column=name)) for name in columns]
    prompt, answers = extract_prompt(parse_prompt(row, asked, place) if asked else None, answers, place)
    if not isinstance(prompt, str):
        prompt = prepend_system(prompt, row.get("system"), place._replace(column="system"))
    tools = [] if isinstance(prompt, str) else parse_tools(row.get("tools"), place._replace(column="tools"))
    return [prompt, *answers, tools]


def read_choice(place: Place, row: Record) -> Question:
    """The question of a row, which is asked as ARC is where it is called that."""
    names = list(row)
    question, choices, answer = row.values()
    question = parse_text(question, place._replace(column=names[0]))
    asked = f"Question: {question}\nAnswer:" if names[0] == "question" else question
    spot = place._replace(column=names[1])
    choices = parse_json(choices, spot) if isinstance(choices, str) else choices
    if isinstance(choices, Mapping):
        return read_labelled_question(
            place, asked, *(parse_list(choices.get(key), spot, parse_text) for key in ("text", "label")), answer
        )
    choices = parse_list(choices, spot, parse_text)
    if place.name.lower().endswith(".csv") and isinstance(answer, str):  # all cells of a csv are texts
        return read_question(place, asked, choices, answer, number=int(answer) if answer.isdecimal() else None)
    return read_question(place, asked, choices, answer)


def _given_conversation(n: int, prompt: TextOrMessages, said: TextOrMessages, tools: list[Message]) -> Conversation:
    """The conversation of row n, of which the prompt is given."""
    if isinstance(prompt, str):
        raise DataError(f"row {n}: the prompt of the first row is messages, this one a text: give all the same way")
    answer = [{"role": "assistant", "content": said}] if isinstance(said, str) else said
    return Conversation([*prompt, *answer], len(prompt), tools)


READERS = {
    Kind.preferences: read_pair,
    Kind.pairs: read_pair,
    Kind.choices: read_choice,
    Kind.questions: read_choice,
    Kind.labelled: read_choice,
    Kind.conversations: read_conversation,
    Kind.share_gpt: read_conversation,
    Kind.completions: read_completion,
    Kind.instructions: read_completion,
    Kind.text: read_texts,
}


def find_kind(path: str, found: Sequence[str]) -> Kind:
    """The first kind whose columns are all there; DataError names what is."""
    for kind in Kind:
        if {*kind.value} - OPTIONAL <= set(found):
            return kind
    known = "; ".join(" ".join(name for name in kind.value if name not in OPTIONAL) for kind in reversed(Kind))
    raise DataError(
        f"data.path={path}: no column 'text', nor those of another kind of rows; found: {', '.join(found)} "
        f"(known: {known}; set data.column)"
    )


def split_last_words(texts: Sequence[str]) -> list[list[str]]:
    """Each text up to its last word, and that with the whitespace before it (LAMBADA: Paperno et al. 2016).

    >>> split_last_words(["I met him at the docks"])
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
def name_path_in_errors(path: str) -> Iterator[None]:
    """Puts the option in front of what is wrong with a row."""
    try:
        yield
    except DataError as error:
        raise DataError(f"data.path={path}: {error}") from None
