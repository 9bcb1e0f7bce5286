"""Batches of a mixture: files, streams and conversations in one order, for any workers, ranks and resumes."""

import json
from itertools import chain, islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from genai_pl.data import byte_tokenizer, special_tokens
from genai_pl.data.chat import ChatDataModule
from genai_pl.data.mixture_datamodule import MixedSource, MixtureDataModule
from genai_pl.data.prompts import PromptsDataModule
from genai_pl.data.text import TextDataModule
from genai_pl.errors import ConfigError, DataError
from genai_pl.objectives import IGNORED, CausalLMCollator, SFTCollator

LOADING = {"seq_len": 16, "batch_size": 2, "val_batch_size": None, "workers": 0, "shuffle": True, "seed": 0}
END = 256  # of the byte tokenizer, and padding after it
TEXT = {"val_path": None, "val_fraction": 0.1, "column": "text", "block_rows": 6, "val_documents": 2}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text("a" * 2000)
    documents = [{"text": "b" * (3 + i % 20)} for i in range(60)]
    talks = [{"prompt": "c" * 4, "completion": "d" * (1 + i % 7)} for i in range(30)]
    for name, rows in (("documents", documents), ("talks", talks)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def module(
    folder: Path, *, stream: bool = True, collate=CausalLMCollator, n_batches: int = 30, ranks=(0, 1), **options
):
    loading = {**LOADING, **options}
    text = {**TEXT, "separate_documents": True, **loading}
    talks = {"val_path": None, "val_fraction": 0.1, "messages": "messages", "prompt": "prompt"}
    talks |= {"completion": "completion", "packing": True, **loading}
    sources = [
        MixedSource("file", TextDataModule(path=str(folder / "text.txt"), streaming=False, **text), [(0.0, 3.0)]),
        MixedSource("talks", ChatDataModule(path=str(folder / "talks.jsonl"), **talks), [(0.0, 1.0), (1.0, 3.0)]),
    ]
    if stream:
        documents = TextDataModule(path=str(folder / "documents.jsonl"), streaming=True, **text)
        sources.insert(1, MixedSource("stream", documents, [(0.0, 2.0)]))
    data = MixtureDataModule(sources, kind="text", by_tokens=True, temperature=1.0, **loading)
    strategy = SimpleNamespace(distributed_sampler_kwargs={"rank": ranks[0], "num_replicas": ranks[1]})
    data.trainer = SimpleNamespace(strategy=strategy, world_size=ranks[1], accumulate_grad_batches=1)
    tokenizer = byte_tokenizer()
    data.prepare(tokenizer, collate(vocabulary=special_tokens(tokenizer, len(tokenizer))))
    data.limit_batches(n_batches, expected=n_batches)
    return data


def seen(data: MixtureDataModule, stop: int | None = None, state: dict | None = None) -> tuple[list, dict]:
    loader = data.train_dataloader()
    if state is not None:
        loader.load_state_dict(state)
    batches = []
    for batch in islice(iter(loader), stop):
        rows = [[token for token in row if token < END] for row in batch["input_ids"].tolist()]
        batches.append([*zip(batch["sources"].tolist(), rows, strict=True)])
    return batches, loader.state_dict()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [1, 7, 18])
def test_a_mixture_goes_on_exactly_where_it_stopped(stop: int, workers: int, folder: Path) -> None:
    expected, _ = seen(module(folder, workers=workers))
    first, state = seen(module(folder, workers=workers), stop)
    rest, _ = seen(module(folder, workers=workers), state=json.loads(json.dumps(plain(state)), object_hook=numbered))
    assert first + rest == expected


def plain(value: object) -> object:
    """The value with tensors as lists: what a checkpoint can hold."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return {"tensor": value.tolist(), "type": str(value.dtype)[6:]} if isinstance(value, torch.Tensor) else value


def numbered(value: dict) -> object:
    if value.keys() == {"tensor", "type"}:
        return torch.tensor(value["tensor"], dtype=getattr(torch, value["type"]))
    return {int(k) if k.isdigit() else k: v for k, v in value.items()}


def test_the_order_of_files_does_not_depend_on_workers_ranks_or_batches(folder: Path) -> None:
    one = [*chain(*seen(module(folder, stream=False, n_batches=24))[0])]
    workers = [*chain(*seen(module(folder, stream=False, n_batches=24, workers=2))[0])]
    wide = [*chain(*seen(module(folder, stream=False, n_batches=6, batch_size=8))[0])]
    ranks = [seen(module(folder, stream=False, n_batches=12, ranks=(rank, 2)))[0] for rank in (0, 1)]
    dealt = [*chain(*chain(*zip(*ranks, strict=True)))]
    assert one == workers == wide == dealt


def test_a_mixture_of_files_is_resumed_with_other_batches_and_ranks(folder: Path) -> None:
    expected = [*chain(*seen(module(folder, stream=False, n_batches=24))[0])]
    first, state = seen(module(folder, stream=False, n_batches=24), 8)
    rest, _ = seen(module(folder, stream=False, n_batches=6, batch_size=8), state=state)
    assert [*chain(*first), *chain(*rest)] == expected
    with pytest.raises(DataError, match="row 16 of its epoch, which batches of 5 rows do not reach"):
        seen(module(folder, stream=False, n_batches=24, batch_size=5), state=state)


def test_the_sources_of_a_batch_are_those_of_its_rows(folder: Path) -> None:
    letters = {0: {ord("a")}, 1: {ord("b")}, 2: {ord("c"), ord("d")}}
    batches, _ = seen(module(folder))
    for source, row in chain(*batches):
        assert {token for token in row if token < 256} <= letters[source]
    assert {source for source, _ in chain(*batches)} == {0, 1, 2}


@pytest.mark.parametrize("collate", [CausalLMCollator, SFTCollator])
def test_text_learns_every_token_and_a_conversation_its_answers(collate, folder: Path) -> None:
    for batch in module(folder, collate=collate).train_dataloader():
        assert batch["targets"] == (batch["labels"] != IGNORED).sum()
        for source, ids, labels in zip(batch["sources"].tolist(), batch["input_ids"], batch["labels"], strict=True):
            if source == 0:
                assert (labels != IGNORED).all()
                assert (ids == ord("a")).all()
            elif source == 2:
                assert not (labels == ord("c")).any()
                assert (labels == ord("d")).any()


def test_validation_is_of_one_source_a_batch_and_of_all_in_turn(folder: Path) -> None:
    data = module(folder)
    sources = [batch["sources"].unique().tolist() for batch in data.val_dataloader()]
    assert sources[:3] == [[0], [1], [2]]
    rows = [s for batch in data.val_dataloader() for s in batch["sources"].tolist()]
    assert [rows.count(n) for n in range(3)] == [len(source.data.val_rows) for source in data.sources]


def test_what_was_given_is_counted_and_said(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = module(folder, n_batches=200)
    data.sources[2] = data.sources[2]._replace(epochs=2)
    data.plans = [data._plan(source) for source in data.sources]
    caplog.set_level("INFO")
    n_tokens = [0, 0, 0]
    for batch in data.train_dataloader():
        for source, n in zip(batch["sources"].tolist(), batch["input_ids"], strict=True):
            n_tokens[source] += len(n)
    metrics, lines = data.mixture_metrics(), data.mixture_lines()
    assert [metrics[f"train/tokens_seen/{name}"] for name in ("file", "stream")] == n_tokens[:2]
    assert sum(metrics[f"train/share/{name}"] for name in data.source_names) == pytest.approx(1)
    assert [line.split(":")[0] for line in lines] == ["mixed       file", "mixed       stream", "mixed       talks"]
    assert lines[2].endswith("2.00 passes, ended")
    said = [record.message for record in caplog.records if "data        " in record.message]
    assert said[-4:].count("data        file has run dry: it is repeated from here on") == 1
    assert said.count("data        stream has run dry: it is repeated from here on") == 1
    assert said.count("data        talks has ended: the others share its weight") == 1


def test_what_cannot_be_mixed_is_refused(folder: Path) -> None:
    data = module(folder)
    source = data.sources[1]
    with pytest.raises(ConfigError, match=r"data.sources.stream.weight: the length of a stream is unknown"):
        data._plan(source._replace(weight=None))
    with pytest.raises(ConfigError, match=r"data.sources.stream.epochs: the length of a stream is unknown; set cap"):
        data._plan(source._replace(epochs=1))
    with pytest.raises(ConfigError, match=r"data.sources.stream.cap=3: less than a row of 16"):
        data._plan(source._replace(cap=3))
    data.sources = [
        s._replace(epochs=None if n == 1 else 1, cap=32 if n == 1 else None) for n, s in enumerate(data.sources)
    ]
    data.plans = [data._plan(s) for s in data.sources]
    data.limit_batches(1000, expected=1000)
    with pytest.raises(
        ConfigError, match=r"data.sources: all end by epochs or cap after \d+ rows, and the run takes 2,000"
    ):
        data.train_dataloader()


def test_prompts_of_two_sources_may_have_other_columns(tmp_path: Path) -> None:
    for name, extra in (("sums", {"answer": "4"}), ("poems", {"theme": "sea"})):
        rows = [{"prompt": f"{name} {i}", **extra} for i in range(20)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"val_path": None, "val_fraction": 0.1, "prompt": "prompt", "max_prompt_len": 16, **LOADING}
    sources = [
        MixedSource(name, PromptsDataModule(path=str(tmp_path / f"{name}.jsonl"), **options))
        for name in ("sums", "poems")
    ]
    data = MixtureDataModule(sources, kind="prompts", by_tokens=False, temperature=1.0, **LOADING)
    data.prepare(byte_tokenizer(), CausalLMCollator())
    assert [plan.weight for plan in data.plans] == [[(0.0, 18.0)], [(0.0, 18.0)]]  # as many rows of each
    for source, name, other in zip(data.sources, ("answer", "theme"), ("theme", "answer"), strict=True):
        columns = source.data.train_rows[0]["columns"]
        assert columns[name] is not None
        assert columns[other] is None
