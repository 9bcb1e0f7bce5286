"""The base of data modules whose examples are texts or conversations.

Prompts and answers are stored as JSON, a text or a list of messages, so that one table holds either; all prompts of a
source must be of one type. Columns `system` and `tools` belong to a conversation where they are there.
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from genai_pl.data import formats, sources
from genai_pl.data.columns import Place, refuse
from genai_pl.data.formats import CONTEXT, INPUT, INSTRUCTION, SYSTEM, TOOLS
from genai_pl.data.messages import (
    MEDIA,
    TextOrMessages,
    is_json_messages,
    prepend_system,
    refuse_media,
)
from genai_pl.data.prompt_tokens import prompt_text
from genai_pl.data.records import Records
from genai_pl.data.table_datamodule import TableDataModule
from genai_pl.data.tool_schemas import parse_tools
from genai_pl.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset as Table

log = logging.getLogger(__name__)

JSON_MESSAGES = r'^(\[.*)?"\s*\[\s*\{'  # JSON of a text, or of a list of texts, that begins like a list of objects


class MessagesDataModule(TableDataModule):
    """Examples of which parts are texts, or messages that a chat template renders.

    format: the layout of the columns (`formats.FORMATS` of the kind), or auto: it is recognized by their names.
    Other arguments: see `TableDataModule`.

    keeps_all_columns: columns that the module does not read are passed on (to rewards), so they are not reported as unused.
    """

    cell_kinds: ClassVar[dict[str, str]] = dict.fromkeys(("messages", "prompt", "completion", "answers", TOOLS), "json")
    optional_columns = (INPUT, CONTEXT, SYSTEM, TOOLS, *MEDIA)
    keeps_all_columns = False

    def __init__(self, *, format: str = formats.AUTO, **rest: object) -> None:
        super().__init__(**rest)
        self.format = format

    def recognized(
        self, source: sources.Source, names: Sequence[str], own: Mapping[str, str] | None = None
    ) -> dict[str, str]:
        """The columns to read, by role, of the format that the source has; own: columns that the user has named."""
        if not names:
            raise DataError(f"data.path={source.name}: no rows")
        return formats.recognize(self.kind, names, path=source.name, selected=self.format, own=own)

    def has_conversations(self) -> bool:
        train, _ = self.tables()
        return "messages" in train.column_names or not isinstance(json.loads(train[0]["prompt"]), str)

    def log_unused_columns(
        self, table: "Table", source: sources.Source, roles: Mapping[str, str], columns: Sequence[str]
    ) -> None:
        """Log the format, the first text that is the JSON of messages, and the columns that nothing reads."""
        if form := formats.named(self.kind, roles):
            renamed = "".join(f"; {column} read as {name}" for name, column in source.columns)
            log.info("data        %s format: %s rows -> %s%s", form.name, f"{len(table):,}", form.becomes, renamed)
        self._log_json_text(table, source)
        if not self.keeps_all_columns:
            has_chat = not isinstance(
                json.loads(table[0]["messages" if "messages" in table.column_names else "prompt"]), str
            )
            _log_unused(source, roles, columns, has_chat=has_chat)

    def _log_json_text(self, table: "Table", source: sources.Source) -> None:
        """Log the first text that is the JSON of messages: it is trained on as that text, which is seldom meant."""
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

    def examples(self, records: Records, roles: Mapping[str, str]) -> Iterator[tuple[Place, dict[str, object] | None]]:
        """The example of each record with its `tools`, and its system message in front; None for one that is left out.

        DataError where some prompts are texts and others messages: one source is tokenized in one way.
        """
        first = None
        beside = [column for column in MEDIA if column not in roles.values()]
        for place, record in records:
            try:
                if not self.keeps_all_columns:  # a reward may read them
                    refuse_media({column: record.get(column) for column in beside}, place)
                example = self.example(record, roles, place)
                # all prompts have the type of the first
                is_text = isinstance(example.get("prompt"), str)
                first = is_text if first is None else first
                if is_text is not first:
                    names = ("messages", "a text") if is_text else ("a text", "messages")
                    refuse(
                        place, f"the prompt of the first row is {names[0]}, this one {names[1]}: give all the same way"
                    )
                # a system message and tools are part of a conversation; a text has neither
                example[TOOLS] = []
                if not is_text:
                    opening = "messages" if "messages" in example else "prompt"
                    if record.get(SYSTEM) and example[opening]:
                        example[opening] = prepend_system(example[opening], record[SYSTEM], place.at(SYSTEM))
                    if record.get(TOOLS):
                        example[TOOLS] = parse_tools(record[TOOLS], place.at(TOOLS))
            except DataError as error:
                example = self.leave_out(error)
            yield place, example

    def encoded_roles(self, table: "Table", *roles: str) -> list[str]:
        """The roles to tokenize: those given, and `tools` where any row has some."""
        import pyarrow.compute as pc

        # not `unique`: for that datasets writes selected rows to a file which it reads again unchecked
        cells = table.select_columns([TOOLS]).with_format("arrow")[:][TOOLS]
        return [*roles, TOOLS] if pc.any(pc.not_equal(cells, "[]")).as_py() else list(roles)

    def render(self, prompt: TextOrMessages) -> str:
        """A prompt as text; messages are rendered by the chat template."""
        return prompt_text(self.tokenizer, prompt) if prompt else ""


def _log_unused(source: sources.Source, roles: Mapping[str, str], columns: Sequence[str], *, has_chat: bool) -> None:
    """Log the columns that are neither read by role nor beside a conversation or an instruction."""
    optional = {SYSTEM, TOOLS} if has_chat else set()
    if not has_chat and roles.get("prompt") == INSTRUCTION:
        optional = {INPUT if INPUT in columns else CONTEXT}
    unused = sorted(" ".join(column.split()) for column in {*columns} - {*roles.values()} - optional)
    if unused:
        log.info("data        %s: columns not used: %s", source.name, ", ".join(unused))


def tools_argument(batch: Mapping[str, list]) -> dict[str, list]:
    """The tools of a batch as keyword argument of an encoder; none where the batch has no such column."""
    return {TOOLS: batch[TOOLS]} if TOOLS in batch else {}
