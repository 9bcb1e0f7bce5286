"""Errors of encoders: the row that is named is the first bad one of the file, in whatever order rows are tokenized."""

from pathlib import Path

import pytest

from genai_pl.data.sources import find_source
from genai_pl.data.table_datamodule import _encoded
from genai_pl.errors import DataError


def test_the_first_bad_row_of_the_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "x"}\n' * 9)

    def encode(batch: dict[str, list]) -> dict[str, list]:
        if "bad" in batch["text"]:
            raise DataError("cannot be read")
        return batch

    batch = {"text": ["good", "bad", "bad", "good"], "row": [1, 8, 3, 2]}  # as a random split orders rows
    with pytest.raises(DataError, match=r"rows.jsonl.*3: cannot be read"):
        _encoded(batch, encode=encode, json_roles=[], source=find_source(str(path)))
