"""Evaluation examples: rows of a source, classified by their columns, with cells parsed as in training.

The first `Kind` whose columns are all there decides. Kinds of one meaning (ARC's and plain choices, ShareGPT's and
OpenAI's conversations) are read differently and then treated as one (`CANONICAL_KINDS`).
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
from itertools import count, islice
from typing import NamedTuple

from genai_pl.data import sources
from genai_pl.data.columns import Place, parse_json, parse_list, parse_text
from genai_pl.data.formats import (
    CONTEXT,
    HISTORY,
    INPUT,
    INSTRUCTION,
    OUTPUT,
    RESPONSE,
    instruction_messages,
    is_dialogue,
    parse_dialogue,
    parse_prompt,
)
from genai_pl.data.messages import (
    MEDIA,
    Message,
    TextOrMessages,
    extract_prompt,
    parse_messages,
    prepend_system,
    refuse_media,
    text_or_messages,
)
from genai_pl.data.records import Record
from genai_pl.data.tool_schemas import parse_tools
from genai_pl.errors import DataError
from genai_pl.evaluation.choices import Question, read_labelled_question, read_question
from genai_pl.evaluation.generative.rows import SETUP_COLUMNS, read_answered, read_tested

log = logging.getLogger(__name__)


class Conversation(NamedTuple):
    """A conversation whose assistant turns after the first `n_prompt` messages are scored.

    messages: all turns. n_prompt: messages that are given. tools: JSON schemas of functions that may be called.
    """

    messages: list[Message]
    n_prompt: int
    tools: list[Message]


OPTIONAL = {"tools", "system", INPUT, CONTEXT, HISTORY, "entry_point", *SETUP_COLUMNS}


class Kind(Enum):
    """What rows are; the value lists their columns, of which those in OPTIONAL may be missing."""

    preferences = ("prompt", "chosen", "rejected", "tools", "system")
    choices = ("prompt", "choices", "answer")
    questions = ("question", "choices", "answer")
    labelled = ("question", "choices", "answerKey")  # ARC on the hub
    conversations = ("messages", "tools", "system")
    completions = ("prompt", "completion", "tools", "system")
    pairs = ("chosen", "rejected", "tools", "system")  # preferences whose answers begin with the prompt
    share_gpt = ("conversations", "tools", "system")  # ShareGPT
    instructions = (INSTRUCTION, OUTPUT, INPUT, HISTORY, "system")  # Alpaca
    dolly = (INSTRUCTION, RESPONSE, CONTEXT, "system")
    tests = ("prompt", "test", "entry_point")  # HumanEval
    listed_tests = ("text", "test_list", "test_setup_code")  # MBPP
    sanitized_tests = ("prompt", "test_list", "test_imports")  # MBPP, sanitized
    text = ("text",)
    answers = ("prompt", "answer")
    asked = ("question", "answer")  # GSM8K
    prompts = ("prompt",)  # scored by a function or a judge


CANONICAL_KINDS = {Kind.questions: Kind.choices, Kind.labelled: Kind.choices, Kind.pairs: Kind.preferences}
FOREIGN_KINDS = (Kind.share_gpt, Kind.instructions, Kind.dolly)  # of other projects; the columns of two are ambiguous
CANONICAL_KINDS |= dict.fromkeys(FOREIGN_KINDS, Kind.conversations)
CANONICAL_KINDS |= {Kind.listed_tests: Kind.tests, Kind.sanitized_tests: Kind.tests}
CANONICAL_KINDS |= {Kind.asked: Kind.answers, Kind.prompts: Kind.answers}
GENERATIVE_KINDS = (Kind.tests, Kind.answers)  # in which the model writes, of the canonical ones


def read_examples(
    path: str,
    *,
    column: str | None = None,
    last_word: bool = False,
    limit: int | None = None,
    columns: Mapping[str, str] | None = None,
    writes: bool = False,
) -> tuple[Kind, list[list]]:
    """The kind of the rows and their columns, those of the kind in its order, or one of `Question`s or `GenerativeRow`s.

    path: a source, of which a shipped set gives its validation file. column: read this column as texts.
    last_word: make a text into a prompt and its last word as completion (LAMBADA). limit: rows to read.
    columns: {name: name in the files} of columns with other names. writes: the model is to continue the prompts, whatever
    other columns say.
    """
    source = sources.shipped_validation(path) or sources.find_source(path, columns=columns)
    available = sources.column_names(source)
    # the columns decide, unless an option names a column of texts
    if writes:
        kind, names = find_prompts(path, available), available
    elif column is None and not last_word:
        kind = find_kind(path, available)
        is_generative = CANONICAL_KINDS.get(kind, kind) in GENERATIVE_KINDS
        names = available if is_generative else [name for name in kind.value if name in available]
    else:
        kind, names = Kind.text, [column or "text"]
        sources.check_columns(source, available, {"data.column": names[0]})
    read = READERS[kind]
    media = [name for name in MEDIA if name in available and name not in names]
    examples = []
    for place, row in islice(sources.read_records(source, {*names, *media}), limit):
        refuse_media({name: row.get(name) for name in media}, place)
        examples.append(read(place, {name: row.get(name) for name in names}))
    if not examples:
        raise DataError(f"data.path={path}: no rows")
    # kinds of one meaning become one; prompts in messages make conversations
    kind = CANONICAL_KINDS.get(kind, kind)
    if kind is Kind.choices or kind in GENERATIVE_KINDS:
        return kind, [examples]
    values = [list(column) for column in zip(*examples, strict=True)]
    if kind is Kind.completions:
        if isinstance(values[0][0], str):
            return kind, values[:2]
        with name_path_in_errors(path):
            return Kind.conversations, [[*map(_given_conversation, count(1), *values)]]
    if last_word:
        with name_path_in_errors(path):
            return Kind.completions, split_last_words(values[0])
    if kind is Kind.text and (empty := [n for n, text in enumerate(values[0], start=1) if not text]):
        log.warning("data        %s of %s texts are empty, first row %s", len(empty), len(examples), empty[0])
    return kind, values


def read_texts(place: Place, record: Record) -> list[str]:
    """The texts of a record."""
    return [parse_text(cell, place.at(name)) for name, cell in record.items()]


def read_pair(place: Place, record: Record) -> list[TextOrMessages]:
    """Prompt, chosen and rejected answer of a record, as in training, and its tools."""
    return _split_answers(place, record, "chosen", "rejected")


def read_conversation(place: Place, record: Record) -> list[Conversation]:
    """The conversation of a record."""
    name = "messages" if "messages" in record else "conversations"
    messages = prepend_system(parse_messages(record[name], place.at(name)), record.get("system"), place.at("system"))
    return [Conversation(messages, 0, parse_tools(record.get("tools"), place.at("tools")))]


def read_instruction(place: Place, record: Record) -> list[Conversation]:
    """The conversation of an Alpaca or Dolly row, of which the answer is scored, and earlier ones of its history."""
    roles = {name: name for name in record}
    messages = instruction_messages(record, roles, place)
    messages = prepend_system(messages, record.get("system"), place.at("system"))
    answer = OUTPUT if OUTPUT in record else RESPONSE
    messages.append({"role": "assistant", "content": parse_text(record[answer], place.at(answer))})
    return [Conversation(messages, 0, [])]


def read_completion(place: Place, record: Record) -> list[TextOrMessages]:
    """Prompt and completion of a record, texts or messages, and its tools."""
    return _split_answers(place, record, "completion")


def _split_answers(place: Place, record: Record, *columns: str) -> list[TextOrMessages]:
    """The prompt of a record, its answers in the given columns, and its tools."""
    prompt_column = "prompt" if "prompt" in record else None
    answers = [text_or_messages(record[name], place.at(name)) for name in columns]
    if prompt_column is None and all(map(is_dialogue, answers)):  # HH
        answers = [parse_dialogue(text, place.at(name)) for text, name in zip(answers, columns, strict=True)]
    prompt, answers = extract_prompt(
        parse_prompt(record, prompt_column, place) if prompt_column else None, answers, place
    )
    if not isinstance(prompt, str):
        prompt = prepend_system(prompt, record.get("system"), place.at("system"))
    tools = [] if isinstance(prompt, str) else parse_tools(record.get("tools"), place.at("tools"))
    return [prompt, *answers, tools]


def read_choice(place: Place, record: Record) -> Question:
    """The question of a record.

    A column called `question` is put into ARC's form, "Question: ...\\nAnswer:"; a `prompt` is used as it is.
    """
    names = list(record)
    # the prompt, in ARC's form for a `question`
    question, choices, answer = record.values()
    question = parse_text(question, place.at(names[0]))
    prompt = f"Question: {question}\nAnswer:" if names[0] == "question" else question
    choices_place = place.at(names[1])
    choices = parse_json(choices, choices_place) if isinstance(choices, str) else choices
    # choices as an object of texts and labels, or as a list
    if isinstance(choices, Mapping):
        return read_labelled_question(
            place,
            prompt,
            *(parse_list(choices.get(key), choices_place, parse_text) for key in ("text", "label")),
            answer,
        )
    choices = parse_list(choices, choices_place, parse_text)
    if place.name.lower().endswith(".csv") and isinstance(answer, str):  # cells of a csv are texts
        return read_question(place, prompt, choices, answer, number=int(answer) if answer.isdecimal() else None)
    return read_question(place, prompt, choices, answer)


def _given_conversation(
    n: int, prompt: TextOrMessages, completion: TextOrMessages, tools: list[Message]
) -> Conversation:
    """The conversation of row n whose prompt is given: its completion is scored."""
    if isinstance(prompt, str):
        raise DataError(f"row {n}: the prompt of the first row is messages, this one a text: give all the same way")
    answer = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
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
    Kind.instructions: read_instruction,
    Kind.dolly: read_instruction,
    Kind.tests: read_tested,
    Kind.listed_tests: read_tested,
    Kind.sanitized_tests: read_tested,
    Kind.text: read_texts,
    Kind.answers: read_answered,
    Kind.asked: read_answered,
    Kind.prompts: read_answered,
}


def find_kind(path: str, names: Sequence[str]) -> Kind:
    """The first kind whose columns are all there; DataError lists the columns found and those of every kind."""
    fitting = [kind for kind in Kind if {*kind.value} - OPTIONAL <= set(names)]
    foreign = [kind.name for kind in fitting if kind in FOREIGN_KINDS]
    if len(foreign) > 1 and fitting[0] in FOREIGN_KINDS:
        raise DataError(
            f"data.path={path}: found: {', '.join(names)}; that is {' and '.join(foreign)}: name the columns that count "
            "(data.columns={prompt: NAME, completion: NAME})"
        )
    if fitting:
        return fitting[0]
    known = "; ".join(" ".join(name for name in kind.value if name not in OPTIONAL) for kind in reversed(Kind))
    raise DataError(
        f"data.path={path}: no column 'text', nor those of another kind of rows; found: {', '.join(names)} "
        f"(known: {known}; set data.column, or data.columns={{prompt: NAME}})"
    )


def find_prompts(path: str, names: Sequence[str]) -> Kind:
    """The kind of rows whose prompts are continued; DataError where they have none."""
    if not {"prompt", "question"} & set(names):
        raise DataError(
            f"data.path={path}: no column 'prompt' or 'question' to continue; found: {', '.join(names)} "
            "(set data.columns={prompt: NAME})"
        )
    return Kind.answers


def split_last_words(texts: Sequence[str]) -> list[list[str]]:
    """Prompts and completions: each text without its last word, and that word with the space before it (Paperno et al. 2016).

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
    """A context in which a DataError about a row names the option data.path, too."""
    try:
        yield
    except DataError as error:
        raise DataError(f"data.path={path}: {error}") from None
