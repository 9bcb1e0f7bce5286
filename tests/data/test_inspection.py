"""Rows shown as they are tokenized: what is learned, given and cut is what training learns, gives and cuts."""

from pathlib import Path

import numpy as np
import pytest

from genai_pl.data.inspection import CUT, GIVEN, LEARNED, Counts, inspected_rows, runs_of
from genai_pl.data.pairs import PairsDataModule
from genai_pl.data.unpaired import UnpairedDataModule
from genai_pl.errors import ConfigError
from tests.data.test_broken_files import LOADING
from tests.data.test_columns import lines, prepared
from tests.data.test_formats import chat, preference

ASKED = {"role": "user", "content": "Sky?"}
ROWS = [{"messages": [ASKED, {"role": "assistant", "content": "Blue" * n}]} for n in (1, 40, 2, 3)]


def shown(data) -> dict[int, list]:
    """The parts of each row by its number in the file."""
    return {row.number: row for table in data.tables() for row in inspected_rows(data, table)}


def kept(part) -> list[int]:
    return part.ids[part.states != CUT].tolist()


def test_the_tokens_of_a_conversation_have_the_state_that_training_gives_them(tmp_path: Path) -> None:
    data = prepared(chat(lines(tmp_path / "a.jsonl", ROWS), packing=False, seq_len=100))
    rows = shown(data)
    trained = [row for rows in (data.train_rows, data.val_rows) for row in rows]
    assert sorted(kept(row.parts[0]) for row in rows.values()) == sorted(row["input_ids"].tolist() for row in trained)
    text = data.tokenizer.decode(rows[1].parts[0].ids[rows[1].parts[0].states == LEARNED].tolist())
    assert text.startswith("Blue<|im_end|>")
    assert [number for number, row in rows.items() if row.is_cut] == [2]
    assert len(kept(rows[2].parts[0])) == data.capacity


def test_the_cut_of_a_pair_is_that_of_its_training_row(tmp_path: Path) -> None:
    pairs = [{"prompt": "p" * 30, "chosen": "c" * n, "rejected": "r" * 4} for n in (3, 50, 5)]
    data = prepared(preference(lines(tmp_path / "pairs.jsonl", pairs), seq_len=40))
    trained = [*data.train_rows, *data.val_rows]
    rows = shown(data)
    found = [{part.label: kept(part) for part in row.parts} for row in rows.values()]
    key = str
    assert sorted(found, key=key) == sorted(({k: v.tolist() for k, v in row.items()} for row in trained), key=key)
    assert {number for number, row in rows.items() if row.is_cut} == {2}
    assert [part.label for part in rows[1].parts] == ["prompt", "chosen", "rejected"]
    assert set(rows[1].parts[0].states) == {GIVEN}


def test_counts_name_the_first_row_of_the_file_that_is_cut_or_empty(tmp_path: Path) -> None:
    rows = [*ROWS, {"messages": [ASKED]}, ROWS[1]]
    data = prepared(chat(lines(tmp_path / "a.jsonl", rows), seq_len=100))
    counts = Counts()
    for row in reversed(shown(data).values()):
        counts.add(row)
    assert (counts.cut, counts.first_cut, counts.empty, counts.first_empty) == (2, 2, 1, 5)
    assert counts.tokens.sum() == sum(counts.lengths)


def test_labelled_completions_show_what_their_label_is(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "completion": "c", "label": n == 0} for n in range(3)]
    names = {name: name for name in ("prompt", "completion", "label")}
    data = prepared(UnpairedDataModule(**names, **{**LOADING, "path": lines(tmp_path / "kto.jsonl", rows)}))
    assert {n: row.parts[1].label for n, row in shown(data).items()} == {
        1: "desirable",
        2: "undesirable",
        3: "undesirable",
    }


def test_a_kind_without_a_view_is_one_line(tmp_path: Path) -> None:
    path = lines(tmp_path / "pairs.jsonl", [{"anchor": "a", "positive": "b"}] * 3)
    data = PairsDataModule(anchor="anchor", positive="positive", negative=None, **{**LOADING, "path": path})
    with pytest.raises(ConfigError, match=r"data=pairs has no view of its rows; those of text, chat, preference"):
        inspected_rows(data, data.tables()[0])


def test_runs_cover_all_states_in_order() -> None:
    states = np.array([0, 0, 1, 2, 2, 2])
    assert list(runs_of(states)) == [(0, 0, 2), (1, 2, 3), (2, 3, 6)]
    assert list(runs_of(states[:0])) == []
