"""The order of batches: a function of seed, epoch and position, for any split into ranks and accumulated batches."""

from functools import partial
from itertools import chain, islice

import pytest
import torch
from datasets import Dataset

from genai_pl.data import byte_tokenizer
from genai_pl.data.loader import BatchPlan, EpochLoader, validation_batches, with_window_targets
from genai_pl.data.packing import Packer
from genai_pl.data.streaming import BatchStream, StreamLoader
from genai_pl.errors import DataError
from genai_pl.objectives import CausalLMCollator


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    numbers = [row["number"] for row in rows]
    return {
        "rows": torch.tensor(numbers),
        "keys": torch.tensor([row["key"] for row in rows]),
        "targets": torch.tensor(float(sum(numbers))),
    }


def seen(loader) -> list[list[int]]:
    return [batch["rows"].tolist() for batch in loader]


def loader(**plan) -> EpochLoader:
    return EpochLoader([{"number": i} for i in range(50)], collate, BatchPlan(**{"batch_size": 4, "seed": 1, **plan}))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [0, 1, 5, 11, 12, 13, 20])
def test_a_resumed_loader_gives_the_rest_of_the_epoch_and_the_next(stop: int, workers: int) -> None:
    whole, first = loader(), loader(workers=workers)
    expected = [*seen(whole), *seen(whole), *seen(whole)]
    got, iterator = [], iter(first)
    for _ in range(stop):
        batch = next(iterator, None)
        if batch is None:
            iterator = iter(first)
            batch = next(iterator)
        got.append(batch["rows"].tolist())
    second = loader(workers=workers)
    second.load_state_dict(first.state_dict()) if stop else None
    while len(got) < len(expected):
        got += seen(second)
    assert got[: len(expected)] == expected


def test_epochs_differ_and_every_row_comes_once() -> None:
    data = loader(batch_size=5)
    first, second = seen(data), seen(data)
    assert first != second
    assert sorted(chain(*first)) == list(range(50)) == sorted(chain(*second))


def test_rows_know_the_epoch_and_their_number_whatever_the_workers() -> None:
    for workers in (0, 2):
        data = loader(workers=workers)
        for epoch in range(2):
            for batch in data:
                assert batch["keys"].tolist() == [[epoch, row] for row in batch["rows"].tolist()]


def test_two_ranks_share_the_rows_of_the_big_batch() -> None:
    big = seen(loader(batch_size=8))
    ranks = [seen(loader(batch_size=4, rank=r, world_size=2)) for r in range(2)]
    assert [a + b for a, b in zip(*ranks, strict=True)] == big


def test_a_run_of_two_ranks_goes_on_with_one() -> None:
    two = loader(batch_size=4, rank=1, world_size=2)
    list(islice(iter(two), 3))
    one = loader(batch_size=8)
    one.load_state_dict(two.state_dict())
    assert seen(one) == seen(loader(batch_size=8))[3:]


def test_another_batch_size_that_misses_the_position_is_an_error() -> None:
    first = loader(batch_size=4)
    list(islice(iter(first), 3))
    with pytest.raises(DataError, match=r"data\.batch_size"):
        loader(batch_size=8).load_state_dict(first.state_dict())


def test_every_batch_of_a_step_knows_the_targets_of_the_step() -> None:
    batches = [{"targets": torch.tensor(float(n))} for n in (3, 1, 4, 1, 5)]
    assert [b["window_targets"].item() for b in with_window_targets(iter(batches), 2)] == [4, 4, 5, 5, 5]


def stream(
    stop: int | None = None, *, workers: int = 0, state: dict | None = None, n_batches: int = 40, accumulate: int = 2
):
    texts = [f"document {i} " * (i % 7 + 1) for i in range(30)]
    source = Dataset.from_dict({"text": texts}).to_iterable_dataset(num_shards=1)
    plan = BatchPlan(batch_size=2, accumulate=accumulate, workers=workers, seed=3)
    pack = partial(Packer, 17)
    rows = BatchStream(
        source, byte_tokenizer(), CausalLMCollator(), plan, build_packer=pack, block_rows=10, continuous=False
    )
    data = StreamLoader(rows, n_batches)
    if state is not None:
        data.load_state_dict(state)
    batches = [batch["input_ids"].tolist() for batch in islice(iter(data), stop)]
    return batches, data.state_dict()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [2, 8, 30])
def test_a_stream_goes_on_exactly_where_it_stopped_also_in_its_later_epochs(stop: int, workers: int) -> None:
    expected, _ = stream(workers=workers, n_batches=80)
    first, state = stream(stop, workers=workers, n_batches=80)
    rest, _ = stream(workers=workers, n_batches=80, state=state)
    assert first + rest == expected


def test_a_stream_resumed_twice_is_still_exact() -> None:
    expected, _ = stream()
    first, state = stream(6)
    second, state = stream(10, state=state)
    third, _ = stream(state=state)
    assert first + second + third == expected


def test_workers_of_a_stream_share_its_documents() -> None:
    one, two = (list(chain(*chain(*stream(workers=w)[0]))) for w in (0, 2))
    assert len(one) == len(two)
    assert one != two


def small_stream(texts: list[str], *, workers: int = 0, world_size: int = 1, rank: int = 0, continuous: bool = False):
    source = Dataset.from_dict({"text": texts}).to_iterable_dataset(num_shards=1)
    plan = BatchPlan(batch_size=2, accumulate=1, rank=rank, world_size=world_size, workers=workers, seed=3)
    rows = BatchStream(
        source,
        byte_tokenizer(),
        CausalLMCollator(),
        plan,
        build_packer=partial(Packer, 17),
        block_rows=4,
        continuous=continuous,
    )
    return StreamLoader(rows, 4)


@pytest.mark.parametrize("continuous", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_of_fewer_documents_than_workers_is_one_line(workers: int, continuous: bool) -> None:
    data = small_stream(["one document"], workers=workers, world_size=2, rank=1, continuous=continuous)
    with pytest.raises(
        DataError, match=f"^data.workers={workers}: the stream has 1 (documents|passages), too few"
    ) as caught:
        list(data)
    assert len(str(caught.value).splitlines()) == 1


def test_as_many_documents_as_workers_are_enough_for_a_stream() -> None:
    assert len(list(small_stream(["one document", "another one"], workers=2))) == 4


@pytest.mark.parametrize("continuous", [False, True])
@pytest.mark.parametrize("texts", [[""], ["", "", ""]])
def test_a_stream_without_any_text_ends_in_one_line(texts: list[str], continuous: bool) -> None:
    with pytest.raises(DataError, match=r"data\.path: (no document in it|there is no text in the documents)"):
        list(small_stream(texts, continuous=continuous))


@pytest.mark.parametrize("n_rows", [3, 4, 5, 11, 12, 13, 24])
@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_ranks_validate_on_as_many_batches_and_on_every_row_once(n_rows: int, batch_size: int) -> None:
    shares = [
        validation_batches(n_rows, batch_size, BatchPlan(batch_size, rank=rank, world_size=3)) for rank in range(3)
    ]
    assert len({len(share) for share in shares}) == 1
    assert sorted(row for share in shares for batch in share for _, row in batch) == list(range(n_rows))
    assert {len(batch) for share in shares for batch in share[:-1]} <= {batch_size}
    assert all(len(share[-1]) <= batch_size + 1 for share in shares)


def test_too_few_rows_to_validate_on_are_one_line() -> None:
    with pytest.raises(
        DataError, match=r"data\.val_path, data.val_fraction: 2 rows to validate on cannot be shared by 3 processes"
    ):
        validation_batches(2, 4, BatchPlan(4, rank=0, world_size=3))


@pytest.mark.parametrize("n_rows", [6, 7, 8, 9, 11, 12, 13, 14, 24])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 4])
def test_a_lone_row_to_validate_on_joins_its_neighbours_on_every_rank(n_rows: int, batch_size: int) -> None:
    plans = [BatchPlan(batch_size, rank=rank, world_size=3) for rank in range(3)]
    shares = [validation_batches(n_rows, batch_size, plan, min_rows=2) for plan in plans]
    assert len({len(share) for share in shares}) == 1
    assert sorted(row for share in shares for batch in share for _, row in batch) == list(range(n_rows))
    assert all(len(batch) >= 2 for share in shares for batch in share)
    assert all(len(batch) <= max(batch_size, 2) + 2 for share in shares for batch in share)


def test_too_few_rows_for_every_rank_to_compare_two_are_one_line() -> None:
    with pytest.raises(DataError, match="5 rows to validate on cannot be shared by 3 processes, which need 2 each"):
        validation_batches(5, 4, BatchPlan(4, rank=0, world_size=3), min_rows=2)


def test_every_batch_of_a_step_knows_all_tokens_of_the_step() -> None:
    batches = [{"targets": torch.tensor(2.0), "tokens": torch.tensor(float(n))} for n in (3, 4, 5)]
    assert [b["window_tokens"].item() for b in with_window_targets(iter(batches), 2)] == [7, 7, 5]
