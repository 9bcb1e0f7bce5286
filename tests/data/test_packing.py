"""Packed rows hold every token once, and a stream gives the rows that the table gives."""

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets

from genai_pl.data.packing import PackedRows, Packer
from genai_pl.objectives import CausalLMCollator, SpecialTokens


def table(*documents: list[int]) -> Dataset:
    return Dataset.from_dict({"input_ids": [np.asarray(d, dtype=np.int32) for d in documents]})


def test_rows_overlap_by_one_token_so_that_every_token_is_once_a_target() -> None:
    rows = PackedRows(table(list(range(10)), list(range(10, 25))), length=7)
    assert [r["input_ids"].tolist() for r in (rows[i] for i in range(len(rows)))] == [
        list(range(7)),
        list(range(6, 13)),
        list(range(12, 19)),
        list(range(18, 25)),
    ]
    assert rows.tail() is None


def test_segments_count_the_documents_of_a_row_from_one() -> None:
    rows = PackedRows(table([1, 2, 3], [4, 5], [6, 7, 8, 9]), length=9)
    assert rows[0]["segment_ids"].tolist() == [1, 1, 1, 2, 2, 3, 3, 3, 3]


def test_the_tail_is_what_no_full_row_holds() -> None:
    rows = PackedRows(table(list(range(12))), length=6)
    assert len(rows) == 2
    assert rows.tail()["input_ids"].tolist() == [10, 11]


def test_rows_run_across_the_chunks_of_a_table() -> None:
    parts = concatenate_datasets([table(list(range(i, i + 7))) for i in range(0, 70, 7)])
    rows = PackedRows(parts, length=17)
    assert rows[3]["input_ids"].tolist() == list(range(48, 65))
    assert rows[3]["segment_ids"].tolist() == [1 + (i // 7 - 48 // 7) for i in range(48, 65)]


def test_selected_documents_only() -> None:
    rows = PackedRows(table([1] * 9, [2] * 9, [3] * 9).select(range(1, 3)), length=18)
    assert rows[0]["input_ids"].tolist() == [2] * 9 + [3] * 9


def test_a_stream_gives_the_rows_of_the_table_and_goes_on_from_its_state() -> None:
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 99, rng.integers(1, 20)).tolist() for _ in range(40)]
    rows, packer = PackedRows(table(*documents), length=14), Packer(14)
    found = []
    for number, document in enumerate(documents):
        if number == 17:
            state, packer = packer.state_dict(), Packer(14)
            packer.load_state_dict(state)
        found += packer.push(np.asarray(document, dtype=np.int32))
    assert len(found) >= len(rows) - 1
    for i, row in enumerate(found[: len(rows)]):
        assert row["input_ids"].tolist() == rows[i]["input_ids"].tolist()
        assert row["segment_ids"].tolist() == rows[i]["segment_ids"].tolist()


def test_no_target_crosses_the_border_of_a_document() -> None:
    rows = PackedRows(table([1, 2, 3], [4, 5], [6, 7, 8, 9]), length=9)
    batch = CausalLMCollator()([rows[0]])
    assert batch["labels"].tolist() == [[2, 3, -100, 5, -100, 7, 8, 9]]
    assert batch["segment_ids"].tolist() == [[1, 1, 1, 2, 2, 3, 3, 3]]
    assert batch["targets"].item() == 6


def test_rows_of_one_document_carry_no_segments_and_short_rows_are_padded() -> None:
    rows = PackedRows(table(list(range(12))), length=6)
    assert "segment_ids" not in CausalLMCollator()([rows[0], rows[1]])
    batch = CausalLMCollator(vocabulary=SpecialTokens(size=100, pad=99))([rows[0], rows.tail()])
    assert batch["input_ids"][1].tolist() == [10, 11, 99, 99, 99]
    assert batch["segment_ids"][1].tolist() == [1, 1, 0, 0, 0]
    assert batch["labels"][1].tolist() == [11, -100, -100, -100, -100]
    assert torch.is_tensor(batch["targets"])
