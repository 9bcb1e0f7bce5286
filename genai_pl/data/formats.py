"""Formats: layouts of columns in which data sets are published, recognized by their columns.

Each kind of data has the project's own columns (`messages`; `prompt` and `completion`; `prompt`, `chosen` and `rejected`)
and some that other projects made common: ShareGPT's, Alpaca's, Dolly's, HH's. This is the one table of them. What was
recognized is said in a line of the log; columns that fit none, or two of them, are refused with what is known.
"""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from genai_pl.data.columns import Place, parse_list, parse_text, preview, refuse
from genai_pl.data.messages import Message, TextOrMessages, text_or_messages
from genai_pl.errors import ConfigError, DataError

INSTRUCTION, INPUT, OUTPUT = "instruction", "input", "output"  # columns of Alpaca
CONTEXT, RESPONSE = "context", "response"  # Dolly's names of the input and the output
SYSTEM = "system"  # a system message in a column of its own
TOOLS = "tools"  # functions that the conversation of a row may call
AUTO = "auto"  # data.format where the columns decide
PAIR = "prompt, chosen, rejected"
HH = "hh"
HISTORY = "history"  # earlier turns beside an instruction, pairs of request and answer
SPEAKER = re.compile(r"\n\n(Human|Assistant):")  # what opens a turn of HH's texts (Bai et al. 2022)
SPEAKERS = {"Human": "user", "Assistant": "assistant"}


class Format(NamedTuple):
    """A layout of columns.

    name: by which `data.format` selects it. roles: the columns by role. becomes: the project's columns that rows become.
    optional: roles whose columns may be missing. is_own: the project's own columns, which win over foreign ones beside them.
    """

    name: str
    roles: Mapping[str, str]
    becomes: str
    optional: tuple[str, ...] = ()
    is_own: bool = False

    @property
    def required(self) -> dict[str, str]:
        """The columns, by role, that a source of this format has."""
        return {role: column for role, column in self.roles.items() if role not in self.optional}

    def restricted(self, names: Sequence[str]) -> dict[str, str]:
        """The columns by role, of those that a source has."""
        return {role: column for role, column in self.roles.items() if column in names or role not in self.optional}


def _format(name: str, columns: str, becomes: str, optional: str = "", *, is_own: bool = False) -> Format:
    """A format whose roles are called like their columns; a role with another name is written `role:column`."""
    pairs = [entry.split(":") for entry in f"{columns} {optional}".split()]
    roles = {pair[0]: pair[-1] for pair in pairs}
    return Format(name, roles, becomes, tuple(entry.split(":")[0] for entry in optional.split()), is_own)


# chosen_turns, rejected_turns: texts that hold all turns, the prompt's among them
FORMATS = {
    "chat": [
        _format("messages", "messages", "messages", is_own=True),
        _format("prompt-completion", "prompt completion", "prompt, completion", is_own=True),
        _format("sharegpt", "conversations", "messages"),
        _format("alpaca", "instruction output", "messages", f"input {HISTORY}"),
        _format("dolly", "instruction response", "messages", "context"),
    ],
    "preference": [
        _format("preference", "prompt chosen rejected", PAIR, is_own=True),
        # of LLaMA-Factory; it has the columns of the next one too, and its own decide
        _format("sharegpt-preference", "conversations chosen rejected", PAIR, is_own=True),
        _format("preference-without-prompt", "chosen rejected", PAIR, is_own=True),
        _format("ranked", "prompt completions", "prompt, completions", is_own=True),
        _format(HH, "chosen_turns:chosen rejected_turns:rejected", PAIR, "prompt_turns:prompt"),
    ],
    "unpaired": [
        _format("kto", "prompt completion label", "prompt, completion, label", is_own=True),
        _format("kto-messages", "messages label", "prompt, completion, label", is_own=True),
    ],
    "stepwise": [_format("stepwise", "prompt completions labels", "prompt, completions, labels", is_own=True)],
    "prompts": [
        _format("prompts", "prompt", "prompt", is_own=True),
        _format("instructions", "instruction", "prompt", "input context"),
    ],
}


def named(kind: str, roles: Mapping[str, str]) -> Format | None:
    """The format that roles are of, the first of its kind whose required roles are all among them."""
    return next((form for form in FORMATS[kind] if set(form.required) <= set(roles)), None)


def recognize(
    kind: str, names: Sequence[str], *, path: str, selected: str = AUTO, own: Mapping[str, str] | None = None
) -> dict[str, str]:
    """The columns by role of the format that a source has; DataError where it has none, or several foreign ones.

    kind: of data. names: the source's columns. path: its name, for errors. selected: `data.format`.
    own: columns of the project's own roles where the user has named others; foreign formats are then not looked for.
    """
    forms = [form._replace(roles={**form.roles, **_named_otherwise(form, own)}) for form in FORMATS[kind]]
    if selected != AUTO:
        return _select(kind, forms, names, path, selected)
    # own columns first, in the order of the table; several foreign formats are ambiguous
    fitting = [form for form in forms if set(form.required.values()) <= set(names) and form.name != HH]
    foreign = [form for form in fitting if not form.is_own and not own]
    first_own = next((form for form in fitting if form.is_own), None)
    if first_own is None and len(foreign) == 1:
        return foreign[0].restricted(names)
    absent = [role for role, column in (own or {}).items() if column != role and column not in names]
    if first_own is None and absent:
        listed = ", ".join(names)
        raise DataError(f"data.path={path}: no column {own[absent[0]]!r}; found: {listed} (set data.{absent[0]})")
    if first_own is None:
        raise DataError(_refusal(kind, forms, names, path, [form.name for form in foreign]))
    return first_own.restricted(names)


def _named_otherwise(form: Format, own: Mapping[str, str] | None) -> dict[str, str]:
    """The columns of an own format's roles for which the user has named another one."""
    return {role: column for role, column in (own or {}).items() if form.is_own and role in form.roles}


def _select(kind: str, forms: Sequence[Format], names: Sequence[str], path: str, selected: str) -> dict[str, str]:
    """The roles of the format that the user has selected; ConfigError for an unknown one, DataError for missing columns."""
    form = next((form for form in forms if form.name == selected), None)
    if form is None:
        raise ConfigError(
            f"data.format={selected}: no format of data={kind}; known: {', '.join([AUTO, *_names(forms)])}"
        )
    missing = [column for column in form.required.values() if column not in names]
    if missing:
        raise DataError(
            f"data.path={path}: data.format={selected} needs the column {missing[0]!r}; found: {', '.join(names)} "
            f"(set data.columns={{{missing[0]}: NAME}})"
        )
    return form.restricted(names)


def _refusal(kind: str, forms: Sequence[Format], names: Sequence[str], path: str, several: list[str]) -> str:
    """The line about columns that fit no format, or several."""
    found = f"data.path={path}: found: {', '.join(names)}"
    if several:
        return f"{found}; that is the format {' and '.join(several)}: choose one with data.format={several[0]}"
    known = "; ".join(f"{form.name} ({', '.join(form.required.values())})" for form in forms if form.name != HH)
    own = ["prompt", "completion"] if kind == "chat" else next(form for form in forms if form.is_own).required.values()
    lacks = next((column for column in own if column not in names), next(iter(own)))
    return (
        f"data.path={path}: no column {lacks!r}; found: {', '.join(names)} (set data.{lacks}); "
        f"no format of data={kind}, known: {known} (set data.columns={{{lacks}: NAME, ...}})"
    )


def _names(forms: Sequence[Format]) -> list[str]:
    return [form.name for form in forms]


def instruction_text(record: Mapping[str, object], roles: Mapping[str, str], place: Place) -> str:
    """The request of an Alpaca or Dolly row: the instruction, and its input or context after a blank line."""
    texts = [parse_text(record.get(roles["instruction"]), place.at(roles["instruction"]))]
    beside = next((roles[role] for role in ("input", "context") if role in roles), None)
    if beside and record.get(beside) not in (None, ""):
        texts.append(parse_text(record[beside], place.at(beside)))
    return "\n\n".join(texts)


def parse_prompt(record: Mapping[str, object], column: str, place: Place) -> TextOrMessages:
    """The prompt of a record; an `instruction` is followed by its `input` (Alpaca) or `context` (Dolly)."""
    prompt = text_or_messages(record.get(column), place.at(column))
    if column != INSTRUCTION or not isinstance(prompt, str):
        return prompt
    context = INPUT if INPUT in record else CONTEXT
    return instruction_text(record, {"instruction": column, "context": context}, place)


def instruction_messages(record: Mapping[str, object], roles: Mapping[str, str], place: Place) -> list[Message]:
    """The messages before the answer of an Alpaca or Dolly row: the turns of its history, and the request."""
    messages = [{"role": "user", "content": instruction_text(record, roles, place)}]
    if HISTORY in roles and record.get(roles[HISTORY]):
        at = place.at(roles[HISTORY])
        messages = [*(turn for pair in parse_list(record[at.column], at, _exchange) for turn in pair), *messages]
    return messages


def _exchange(pair: object, place: Place) -> list[Message]:
    """The two messages of an entry of a history, [request, answer]."""
    if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
        refuse(place, f"{preview(pair)} is no pair of a request and its answer")
    return [
        {"role": role, "content": parse_text(text, place)}
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]


def is_dialogue(value: object) -> bool:
    r"""Whether a cell is one of HH's texts, whose turns begin with "\n\nHuman:" and "\n\nAssistant:".

    >>> is_dialogue("\n\nHuman: Hi\n\nAssistant: Hello"), is_dialogue("Human: Hi")
    (True, False)
    """
    return isinstance(value, str) and value.startswith("\n\nHuman:") and "\n\nAssistant:" in value


def parse_dialogue(text: str, place: Place) -> list[Message]:
    r"""The messages of one of HH's texts; DataError for a text before the first turn.

    >>> parse_dialogue("\n\nHuman: Hi\n\nAssistant: Hello", Place("a", 1))
    [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello'}]
    """
    before, *turns = SPEAKER.split(text)
    if before.strip() or not turns:
        refuse(place, f"{preview(text)} does not begin with '\\n\\nHuman:', as the texts of the format hh do")
    contents = [content.removeprefix(" ") for content in turns[1::2]]
    return [{"role": SPEAKERS[who], "content": content} for who, content in zip(turns[::2], contents, strict=True)]
