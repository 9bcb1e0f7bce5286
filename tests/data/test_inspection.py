"""Rows shown as they are tokenized: what is learned, given and cut is what training learns, gives and cuts."""

from pathlib import Path

import numpy as np
import pytest

from genai_pl.data.datamodule import RowsDataModule
from genai_pl.data.inspected_kinds import inspected_rows
from genai_pl.data.inspection import CUT, GIVEN, LEARNED, Counts, runs_of
from genai_pl.data.labelled import LabelledDataModule
from genai_pl.data.pairs import PairsDataModule
from genai_pl.data.rerank import RerankDataModule
from genai_pl.data.seq2seq import Seq2SeqDataModule
from genai_pl.data.tags import TagsDataModule
from genai_pl.data.unpaired import UnpairedDataModule
from genai_pl.errors import ConfigError
from genai_pl.objectives.token_loss import IGNORED
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
    ids = [row["input_ids"].tolist() for row in trained(data)]
    assert sorted(kept(row.parts[0]) for row in rows.values()) == sorted(ids)
    text = data.tokenizer.decode(rows[1].parts[0].ids[rows[1].parts[0].states == LEARNED].tolist())
    assert text.startswith("Blue<|im_end|>")
    assert [number for number, row in rows.items() if row.is_cut] == [2]
    assert len(kept(rows[2].parts[0])) == data.capacity


def test_the_cut_of_a_pair_is_that_of_its_training_row(tmp_path: Path) -> None:
    pairs = [{"prompt": "p" * 30, "chosen": "c" * n, "rejected": "r" * 4} for n in (3, 50, 5)]
    data = prepared(preference(lines(tmp_path / "pairs.jsonl", pairs), seq_len=40))
    rows = shown(data)
    found = [{part.label: kept(part) for part in row.parts} for row in rows.values()]
    key = str
    assert sorted(found, key=key) == sorted(({k: v.tolist() for k, v in row.items()} for row in trained(data)), key=key)
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


def module(kind: type, path: str, **options: object):
    """A prepared data module of the kind, with the labels of its rows."""
    data = kind(**{**LOADING, "path": path, **options})
    if hasattr(data, "find_labels"):
        data.find_labels(None)
    return prepared(data)


def trained(data) -> list[dict]:
    return [row for rows in (data.train_rows, data.val_rows) for row in rows]


def test_the_texts_of_a_pair_are_cut_each_by_itself(tmp_path: Path) -> None:
    rows = [{"anchor": "a" * n, "positive": "p" * 30, "negative": "n"} for n in (3, 50, 0)]
    names = {name: name for name in ("anchor", "positive", "negative")}
    data = module(PairsDataModule, lines(tmp_path / "pairs.jsonl", rows), seq_len=20, **names)
    found = [{part.label: kept(part) for part in row.parts} for row in shown(data).values()]
    assert sorted(found, key=str) == sorted(({k: v.tolist() for k, v in row.items()} for row in trained(data)), key=str)
    assert [number for number, row in shown(data).items() if row.is_empty] == [3]
    assert shown(data)[2].length == 51  # with the end token


def test_of_sources_and_targets_the_targets_are_learned(tmp_path: Path) -> None:
    rows = [{"source": "s" * n, "target": "t" * n} for n in (3, 50)] + [{"source": "s", "target": " "}]
    path = lines(tmp_path / "rows.jsonl", rows)
    data = module(Seq2SeqDataModule, path, seq_len=20, source="source", target="target", packing=False)
    found = sorted([kept(row.parts[0]), kept(row.parts[1])] for row in shown(data).values())
    assert found == sorted([row["source"].tolist(), row["target"].tolist()] for row in trained(data))
    assert [set(part.states) for part in shown(data)[1].parts] == [{GIVEN}, {LEARNED}]
    assert [number for number, row in shown(data).items() if row.is_empty] == [3]


@pytest.mark.parametrize("second", [None, "text_pair"])
def test_labelled_texts_show_their_label_and_what_is_cut_of_either_text(second: str | None, tmp_path: Path) -> None:
    rows = [{"text": "abc " * n, "text_pair": "xyz " * (9 - n), "label": ["no", "yes"][n % 2]} for n in range(1, 9)]
    options = {"text": "text", "text_pair": second, "label": "label", "labels": None, "problem_type": None}
    data = module(LabelledDataModule, lines(tmp_path / "rows.jsonl", rows), seq_len=20, **options)
    found = shown(data)
    assert sorted(kept(row.parts[0]) for row in found.values()) == sorted(
        r["input_ids"].tolist() for r in trained(data)
    )
    assert [found[n].note for n in (1, 2)] == ["label: yes", "label: no"]
    assert found[8].length == 32 + (4 if second else 0)


def test_each_document_of_a_query_shows_its_relevance(tmp_path: Path) -> None:
    rows = [{"query": "q" * n, "documents": ["d" * 30, "e"], "labels": [1, 0]} for n in (1, 40)]
    options = {"query": "query", "document": "documents", "label": "labels"}
    data = module(RerankDataModule, lines(tmp_path / "rows.jsonl", rows), seq_len=20, **options)
    found = shown(data)
    assert sorted([kept(part) for part in row.parts] for row in found.values()) == sorted(
        [pair.tolist() for pair in row["pairs"]] for row in trained(data)
    )
    assert [part.label for part in found[1].parts] == ["relevance 1", "relevance 0"]


def test_of_tagged_sentences_the_first_token_of_each_word_is_learned(tmp_path: Path) -> None:
    rows = [{"tokens": ["Anna", "lives"] * n, "tags": ["B-PER", "O"] * n} for n in (1, 2, 5)]
    options = {"tokens": "tokens", "tags": "tags", "labels": None}
    data = module(TagsDataModule, lines(tmp_path / "rows.jsonl", rows), seq_len=16, **options)
    found = sorted(
        (kept(row.parts[0]), np.flatnonzero(row.parts[0].states == LEARNED).tolist()) for row in shown(data).values()
    )
    rows = ((row["input_ids"].tolist(), np.flatnonzero(row["labels"] != IGNORED).tolist()) for row in trained(data))
    assert found == sorted(rows)
    assert shown(data)[1].note == "tags: Anna/B-PER lives/O"


def test_a_kind_without_a_view_is_one_line() -> None:
    data = RowsDataModule(seq_len=8, batch_size=1, val_batch_size=None, workers=0, shuffle=False, seed=0)
    with pytest.raises(ConfigError, match=r"data=text has no view of its rows; those of text, chat, preference"):
        inspected_rows(data, [])


def test_runs_cover_all_states_in_order() -> None:
    states = np.array([0, 0, 1, 2, 2, 2])
    assert list(runs_of(states)) == [(0, 0, 2), (1, 2, 3), (2, 3, 6)]
    assert list(runs_of(states[:0])) == []
