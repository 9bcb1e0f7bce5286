"""Examples that are texts or conversations: what their data modules share."""

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, ClassVar

from genai_pl.data.chat import prompt_text
from genai_pl.data.columns import Place, refuse, text_of
from genai_pl.data.messages import Given, given_of, tools_of
from genai_pl.data.records import Records, Row
from genai_pl.data.table import TableDataModule

if TYPE_CHECKING:
    from datasets import Dataset as Table

INSTRUCTION, INPUT, OUTPUT = "instruction", "input", "output"  # as Alpaca has them
TOOLS = "tools"  # what the conversation of a row may call


class TalksDataModule(TableDataModule):
    """Rows of which parts are texts, or messages that a chat template renders."""

    kinds: ClassVar[dict[str, str]] = dict.fromkeys(("messages", "prompt", "completion", "answers", TOOLS), "json")
    beside = (INPUT, TOOLS)

    def has_conversations(self) -> bool:
        train, _ = self.tables()
        return "messages" in train.column_names or not isinstance(json.loads(train[0]["prompt"]), str)

    def stored(self, roles: Mapping[str, str]) -> list[str]:
        return [*roles, TOOLS]

    def examples(self, rows: Records, roles: Mapping[str, str]) -> Iterator[tuple[Place, dict[str, object]]]:
        """Adds the tools of conversations; all prompts must be texts, or all of them messages."""
        first = None
        for place, row in rows:
            found = self.example(row, roles, place)
            is_text = isinstance(found.get("prompt"), str)
            first = is_text if first is None else first
            if is_text is not first:
                names = ("messages", "a text") if is_text else ("a text", "messages")
                refuse(place, f"the prompt of the first row is {names[0]}, this one {names[1]}: give all the same way")
            found[TOOLS] = [] if is_text else tools_of(row.get(TOOLS), place._replace(column=TOOLS))
            yield place, found

    def encoding(self, table: "Table", *roles: str) -> list[str]:
        """The roles with that of the tools, where any row has some."""
        return [*roles, TOOLS] if any(cell != "[]" for cell in table.unique(TOOLS)) else list(roles)

    def text(self, given: Given) -> str:
        """A prompt as text, conversations rendered."""
        return prompt_text(self.tokenizer, given) if given else ""


def prompt_of(row: Row, column: str, place: Place) -> Given:
    """What a row gives: a text or messages; to an `instruction` its `input` belongs, after a blank line (Alpaca)."""
    found = given_of(row.get(column), place._replace(column=column))
    if column != INSTRUCTION or row.get(INPUT) in (None, "") or not isinstance(found, str):
        return found
    return f"{found}\n\n{text_of(row[INPUT], place._replace(column=INPUT))}"


def of_tools(batch: Mapping[str, list]) -> dict[str, list]:
    """The tools of a batch as the argument of an encoder, where it has any."""
    return {TOOLS: batch[TOOLS]} if TOOLS in batch else {}
