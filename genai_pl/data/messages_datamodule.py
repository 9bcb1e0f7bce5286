"""Examples that are texts or conversations: what their data modules share."""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from genai_pl.data import sources
from genai_pl.data.columns import Place, parse_text, refuse
from genai_pl.data.messages import TextOrMessages, is_json_messages, parse_tools, prepend_system, text_or_messages
from genai_pl.data.prompt_tokens import prompt_text
from genai_pl.data.records import Record, Records
from genai_pl.data.table_datamodule import TableDataModule

if TYPE_CHECKING:
    from datasets import Dataset as Table

log = logging.getLogger(__name__)

JSON_MESSAGES = r'^(\[.*)?"\s*\[\s*\{'  # JSON of a text, or of texts, one of which begins like a list of objects
INSTRUCTION, INPUT, OUTPUT = "instruction", "input", "output"  # as Alpaca has them
CONTEXT = "context"  # what Dolly calls the input
SYSTEM = "system"  # of a conversation, in a column of its own
TOOLS = "tools"  # what the conversation of a row may call


class MessagesDataModule(TableDataModule):
    """Rows of which parts are texts, or messages that a chat template renders."""

    cell_kinds: ClassVar[dict[str, str]] = dict.fromkeys(("messages", "prompt", "completion", "answers", TOOLS), "json")
    optional_columns = (INPUT, CONTEXT, SYSTEM, TOOLS)
    keeps_all_columns = False  # whether the columns that are not read go on to somebody else

    def has_conversations(self) -> bool:
        train, _ = self.tables()
        return "messages" in train.column_names or not isinstance(json.loads(train[0]["prompt"]), str)

    def log_unused_columns(
        self, table: "Table", source: sources.Source, roles: Mapping[str, str], columns: Sequence[str]
    ) -> None:
        """Adds the first text that is the JSON of messages; columns that go on to somebody else are not said."""
        self._log_json_text(table, source)
        if not self.keeps_all_columns:
            talks = not isinstance(
                json.loads(table[0]["messages" if "messages" in table.column_names else "prompt"]), str
            )
            _log_unused(source, roles, columns, talks=talks)

    def _log_json_text(self, table: "Table", source: sources.Source) -> None:
        """Log the first text that is the JSON of messages."""
        import pyarrow.compute as pc

        for role in (column for column in table.column_names if self.cell_kinds.get(column) == "json"):
            cells = table.with_format("arrow")[:][role]
            for number in pc.indices_nonzero(pc.match_substring_regex(cells, JSON_MESSAGES)).to_pylist():
                value = json.loads(cells[number].as_py())
                if any(is_json_messages(text) for text in (value if isinstance(value, list) else [value])):
                    place = sources.locate_row(source, number + 1)
                    log.info("data        %s: %s is JSON in a text, and taken as that text: give a list", place, role)
                    break

    def table_roles(self, roles: Mapping[str, str]) -> list[str]:
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
            opening = "messages" if "messages" in found else "prompt"
            if not is_text:
                found[opening] = prepend_system(found[opening], row.get(SYSTEM), place._replace(column=SYSTEM))
            found[TOOLS] = [] if is_text else parse_tools(row.get(TOOLS), place._replace(column=TOOLS))
            yield place, found

    def encoded_roles(self, table: "Table", *roles: str) -> list[str]:
        """The roles with that of the tools, where any row has some."""
        import pyarrow.compute as pc

        # not `unique`, for which datasets writes the chosen rows to a file that it reads again without a check
        cells = table.select_columns([TOOLS]).with_format("arrow")[:][TOOLS]
        return [*roles, TOOLS] if pc.any(pc.not_equal(cells, "[]")).as_py() else list(roles)

    def render(self, given: TextOrMessages) -> str:
        """A prompt as text, conversations rendered."""
        return prompt_text(self.tokenizer, given) if given else ""


def parse_prompt(row: Record, column: str, place: Place) -> TextOrMessages:
    """What a row gives: a text or messages; to an `instruction` its `input` belongs (Alpaca), or `context` (Dolly)."""
    found = text_or_messages(row.get(column), place._replace(column=column))
    beside = INPUT if INPUT in row else CONTEXT
    if column != INSTRUCTION or row.get(beside) in (None, "") or not isinstance(found, str):
        return found
    return f"{found}\n\n{parse_text(row[beside], place._replace(column=beside))}"


def _log_unused(source: sources.Source, roles: Mapping[str, str], columns: Sequence[str], *, talks: bool) -> None:
    beside = {SYSTEM, TOOLS} if talks else set()
    if not talks and roles.get("prompt") == INSTRUCTION:
        beside = {INPUT if INPUT in columns else CONTEXT}
    unused = sorted(" ".join(column.split()) for column in {*columns} - {*roles.values()} - beside)
    if unused:
        log.info("data        %s: columns not used: %s", source.name, ", ".join(unused))


def tools_argument(batch: Mapping[str, list]) -> dict[str, list]:
    """The tools of a batch as the argument of an encoder, where it has any."""
    return {TOOLS: batch[TOOLS]} if TOOLS in batch else {}
