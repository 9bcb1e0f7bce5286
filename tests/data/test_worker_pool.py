"""Tokenizing in several processes gives the same file as in one, and errors come in their place."""

from pathlib import Path

import pytest
from datasets import config

from genai_pl.data.worker_pool import map_in_order
from genai_pl.errors import DataError
from tests.data.test_columns import lines, prepared
from tests.data.test_formats import chat


def halve(n: int) -> float:
    if n == 3:
        raise DataError("row 3 is bad")
    return n / 2


def test_results_keep_their_order_and_an_error_comes_in_its_place() -> None:
    assert list(map_in_order(halve, [8, 6, 4, 2, 0], 2)) == [4, 3, 2, 1, 0]
    found = map_in_order(halve, [8, 3, 4], 2)
    assert next(found) == 4
    with pytest.raises(DataError, match="row 3 is bad"):
        next(found)


def test_rows_tokenized_by_two_processes_are_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"prompt": f"What is {n}?", "completion": f"It is {n}."} for n in range(2500)]
    path, written = lines(tmp_path / "rows.jsonl", rows), []
    for encoders in (0, 2):
        monkeypatch.setattr(config, "HF_DATASETS_CACHE", str(tmp_path / f"cache{encoders}"))
        data = chat(path)
        data.encoders = encoders
        prepared(data)
        written.append(
            {file.name: file.read_bytes() for file in (tmp_path / f"cache{encoders}" / "genai_pl").iterdir()}
        )
    assert written[0] == written[1]
    assert len(written[0]) == 3  # the table, and the tokens of both parts
