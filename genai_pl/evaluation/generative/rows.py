"""Rows of tasks in which a model writes: a prompt with the answers or the tests that a completion is measured by.

Columns are those of published sets: `prompt` or `question` with `answer` (GSM8K), `prompt` with `test` and `entry_point`
(HumanEval, Chen et al. 2021), `text` or `prompt` with `test_list` (MBPP, Austin et al. 2021).
"""

from typing import NamedTuple

from genai_pl.data.columns import Place, parse_list, parse_text, refuse
from genai_pl.data.messages import TextOrMessages, text_or_messages
from genai_pl.data.records import Record

ANSWER_COLUMNS = ("answer", "completion", "reference")  # the first that a row has
SETUP_COLUMNS = ("test_setup_code", "test_imports")  # of MBPP, as published and as sanitized
CODE_STOPS = ["\nclass ", "\ndef ", "\n#", "\nif ", "\nprint("]  # that end a function (Chen et al. 2021, section 2.1)


class GenerativeRow(NamedTuple):
    """A prompt, and what its completions are measured by.

    answers: any of these is right. test: Python that follows a program. entry_point: the function that a HumanEval row
    asks for, "" otherwise. is_question: whether the prompt is a bare question. record: all columns, for functions.
    """

    prompt: TextOrMessages
    answers: list[str]
    test: str
    entry_point: str
    is_question: bool
    record: dict[str, object]

    @property
    def begins_program(self) -> bool:
        """Whether the prompt is the beginning of the program that its completion continues."""
        return bool(self.entry_point) and isinstance(self.prompt, str) and f"def {self.entry_point}" in self.prompt

    @property
    def start(self) -> str:
        """A prompt that is text; the beginning of a program without its last line break, which its body begins with."""
        return self.prompt.rstrip() if self.begins_program else self.prompt


def read_answered(place: Place, record: Record) -> GenerativeRow:
    """The row of a prompt or question with its right answers, one or a list of them; none where it has no such column."""
    name = "prompt" if "prompt" in record else "question"
    prompt = text_or_messages(record[name], place.at(name))
    column = next((column for column in ANSWER_COLUMNS if column in record), None)
    answers: list[str] = []
    if column is not None:
        cell = record[column]
        is_list = isinstance(cell, list)
        answers = parse_list(cell, place.at(column), parse_text) if is_list else [parse_text(cell, place.at(column))]
        if not answers:
            refuse(place.at(column), "an empty list: give at least one right answer")
    return GenerativeRow(prompt, answers, "", "", name == "question", dict(record))


def read_tested(place: Place, record: Record) -> GenerativeRow:
    """The row of a prompt with tests: HumanEval's `test`, which may be a list of statements, or MBPP's `test_list`."""
    name = "prompt" if "prompt" in record else "text"
    prompt = text_or_messages(record[name], place.at(name))
    column = "test" if "test" in record else "test_list"
    entry_point = (
        "" if record.get("entry_point") is None else parse_text(record["entry_point"], place.at("entry_point"))
    )
    # setup, then the tests, then the call of HumanEval's check
    lines: list[str] = []
    for setup in (column for column in SETUP_COLUMNS if record.get(column)):
        lines += _statements(record[setup], place.at(setup))
    lines += _statements(record[column], place.at(column))
    if not any(line.strip() for line in lines):
        refuse(place.at(column), "no test: every program would pass")
    if entry_point and "def check(" in "\n".join(lines):
        lines.append(f"check({entry_point})")
    return GenerativeRow(prompt, [], "\n".join(lines), entry_point, False, dict(record))


def _statements(cell: object, place: Place) -> list[str]:
    """The statements of a cell, one text or a list of texts."""
    return parse_list(cell, place, parse_text) if isinstance(cell, list) else [parse_text(cell, place)]


def default_stop(rows: list[GenerativeRow], *, chat: bool, extracts: bool) -> list[str]:
    """Texts that end a completion where no option says so.

    chat: an end token does it. Programs that continue their prompt end where their function does; answers of one line
    with it, unless the right answer is extracted from a longer text; those to questions at the next question.
    """
    if chat or not rows:
        return []
    if all(row.begins_program for row in rows):
        return CODE_STOPS
    if rows[0].is_question:
        return ["Question:"] if extracts else ["\n"]
    if rows[0].answers and not extracts and not any("\n" in a.strip() for row in rows for a in row.answers):
        return ["\n"]
    return []
