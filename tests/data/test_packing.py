"""Packed rows hold every token once, whole examples fill rows, and a stream gives the rows that the table gives."""

import numpy as np
import pytest
import torch
from datasets import Dataset, concatenate_datasets

from genai_pl.data.packing import PackedRows, Packer, pack
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


def chat_lengths(n: int, capacity: int, *, median: float, spread: float) -> np.ndarray:
    """Log-normal, as lengths of conversations are, and at most `capacity`."""
    lengths = np.random.default_rng(n).lognormal(np.log(median), spread, n)
    return np.clip(lengths.astype(np.int64), 4, capacity)


def best_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing in quadratic time; which of equally full rows is taken does not matter to their number."""
    bins: list[list[int]] = []
    left: list[int] = []
    for example in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = [b for b in range(len(bins)) if left[b] >= lengths[example]]
        if not fitting:
            bins.append([])
            left.append(capacity)
            fitting = [len(bins) - 1]
        target = min(fitting, key=left.__getitem__)
        bins[target].append(example)
        left[target] -= lengths[example]
    return bins


@pytest.mark.parametrize(("median", "spread"), [(150, 0.8), (500, 1.0), (60, 0.5), (900, 1.2)])
@pytest.mark.parametrize("capacity", [1025, 2049])
def test_rows_hold_every_example_once_and_at_least_97_percent_text(median: float, spread: float, capacity: int) -> None:
    lengths = chat_lengths(20_000, capacity, median=median, spread=spread)
    bins = pack(lengths, capacity)
    assert sorted(example for examples in bins for example in examples) == list(range(len(lengths)))
    totals = [lengths[examples].sum() for examples in bins]
    assert max(totals) <= capacity
    assert sum(totals) / (len(bins) * capacity) >= 0.97
    assert bins == pack(lengths.tolist(), capacity)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("longest", [32, 15])
def test_packing_fills_rows_as_best_fit_decreasing_does(seed: int, longest: int) -> None:
    lengths = np.random.default_rng(seed).integers(3, longest + 1, 200).tolist()

    def totals(bins: list[list[int]]) -> list[int]:
        return sorted(sum(lengths[i] for i in examples) for examples in bins)

    assert totals(pack(lengths, 32)) == totals(best_fit(lengths, 32))


def test_packing_of_few_examples() -> None:
    assert pack([], 8) == []
    assert pack([8], 8) == [[0]]
    assert pack([3, 5, 8, 5], 8) == [[2], [1], [3, 0]]
    assert pack([1] * 9, 4) == [[0, 1, 2, 3], [4, 5, 6, 7], [8]]
    for impossible in ([0], [9], [-1]):
        with pytest.raises(AssertionError):
            pack(impossible, 8)


@pytest.mark.slow
def test_a_million_examples_are_packed_in_seconds() -> None:
    import time

    lengths = chat_lengths(1_000_000, 8192, median=600, spread=1.0)
    start = time.perf_counter()
    bins = pack(lengths, 8192)
    assert time.perf_counter() - start < 20
    assert lengths.sum() / (len(bins) * 8192) > 0.99
