"""Tables kept on disk: never believed when damaged, and named by what the files say, whatever their times are."""

import json
import logging
import os
import random
import shutil
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest

from genai_pl.data import byte_tokenizer, checksummed, sources
from genai_pl.data.pairs import PairsDataModule
from genai_pl.data.text import TextDataModule
from genai_pl.errors import DataError
from genai_pl.modules import precompute
from genai_pl.objectives import CausalLMCollator, SpecialTokens
from genai_pl.objectives.pairs import PairCollator

END = 256
TEXT = {
    "val_path": None, "val_fraction": 0.1, "column": "text", "seq_len": 16, "batch_size": 2, "val_batch_size": None,
    "workers": 0, "shuffle": True, "streaming": False, "block_rows": 8, "val_documents": 2, "separate_documents": True,
    "seed": 0,
}  # fmt: skip
PAIRS = {
    "val_path": None, "val_fraction": 0.1, "anchor": "prompt", "positive": "completion", "negative": None,
    "seq_len": 64, "batch_size": 2, "val_batch_size": None, "workers": 0, "shuffle": True, "seed": 0,
}  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "genai_pl"


def documents(n: int) -> list[str]:
    return [f"document {i}, " + "words " * (i % 5) for i in range(n)]


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tokens(path: Path) -> list[int]:
    """The tokens of all training documents, end to end."""
    data = TextDataModule(path=str(path), **TEXT)
    data.prepare(byte_tokenizer(), CausalLMCollator())
    return np.concatenate(data.train_rows.values).tolist()


def expected_tokens(texts: list[str]) -> list[int]:
    """The bytes of the first nine tenths of all characters, each document closed."""
    found = [[*text.encode(), END] for text in texts]
    left = int(sum(map(len, texts)) * 0.9)
    kept = []
    for row in found:
        kept += row if len(row) - 1 <= left else [*row[:left], END] if left else []
        left = max(0, left - (len(row) - 1))
    return kept


def batch_ends(path: Path) -> list[int]:
    """Where the messages of an Arrow stream end: what is left before such a place is a whole stream of fewer rows."""
    ends = []
    with pa.memory_map(str(path)) as file:
        reader = pa.ipc.MessageReader.open_stream(file)
        for _ in reader:
            ends.append(file.tell())
    return ends


def damages(contents: bytes, ends: list[int]) -> dict[str, bytes]:
    rng = random.Random(0)
    n = len(contents)
    found = {f"cut at {end}": contents[:end] for end in ends}
    found |= {f"cut at {at}": contents[:at] for at in (0, 1, n - 1, n - 33, *rng.sample(range(n), 5))}
    for _ in range(5):
        at = rng.randrange(n)
        size = min(64, n - at)
        zeros = contents[:at] + bytes(size) + contents[at + size :]
        flipped = contents[:at] + bytes([contents[at] ^ 1]) + contents[at + 1 :]
        found |= {f"flip at {at}": flipped, f"longer by {at}": contents + bytes(at + 1)}
        found |= {f"zeros at {at}": zeros} if zeros != contents else {}
    return found


def test_a_damaged_table_or_its_tokens_are_made_again_and_that_is_said(
    cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    texts = documents(1500)
    path = write(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    right = expected_tokens(texts)
    assert tokens(path) == right
    files = {file: file.read_bytes() for file in cache.glob("*.arrow")}
    assert sorted(file.name.split("-")[0] for file in files) == ["table", "tokens", "tokens"]
    tried = 0
    for file, contents in files.items():
        for name, damaged in damages(contents, batch_ends(file)).items():
            caplog.clear()
            file.write_bytes(damaged)
            assert tokens(path) == right, f"{file.name}: {name}"
            assert [r.getMessage().split(" (")[0] for r in caplog.records if r.levelno == logging.WARNING] == [
                f"cache       {file} was damaged"
            ]
            assert file.read_bytes() == contents
            tried += 1
    assert tried > 60


def test_the_tokens_of_a_table_of_pairs_are_made_again_where_they_are_damaged(cache: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}+1=", "completion": str(i + 1)} for i in range(40)]
    path = write(tmp_path / "a.jsonl", rows)

    def read() -> list[list[int]]:
        data = PairsDataModule(path=str(path), **PAIRS)
        data.prepare(byte_tokenizer(), PairCollator(vocabulary=SpecialTokens(size=258, end=END, pad=257)))
        return [np.asarray(value).tolist() for row in data.train_rows for value in row.values()]

    right = read()
    for file in cache.glob("*.arrow"):
        contents = file.read_bytes()
        for damaged in (b"", contents[: len(contents) // 2], bytes(len(contents)), contents[:-40] + bytes(40)):
            file.write_bytes(damaged)
            assert read() == right
            assert file.read_bytes() == contents
    for kind in ("table", "rows"):
        assert list(cache.glob(f"{kind}-*.arrow"))


def test_tokens_stay_readable_when_the_cache_is_deleted_while_they_are_read(cache: Path, tmp_path: Path) -> None:
    texts = documents(50)
    path = write(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    data = TextDataModule(path=str(path), **TEXT)
    data.prepare(byte_tokenizer(), CausalLMCollator())
    shutil.rmtree(cache)
    assert np.concatenate(data.train_rows.values).tolist() == expected_tokens(texts)
    assert tokens(path) == expected_tokens(texts)


def test_new_contents_under_the_old_time_and_size_are_new_tokens(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    for letter in "abcab":
        (tmp_path / "new").write_text(letter * 500)
        os.utime(tmp_path / "new", ns=(10**18, 10**18))
        shutil.copy2(tmp_path / "new", path)  # as cp -p and rsync -t do
        assert path.stat().st_mtime_ns == 10**18
        assert set(tokens(path)) == {ord(letter), END}


def test_a_file_that_changes_while_it_is_read_is_one_line_and_leaves_nothing(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": text} for text in documents(20)])
    read = sources.read_records

    def changing(*arguments):
        yield from read(*arguments)
        write(path, [{"text": "other"}])

    with monkeypatch.context() as patch:
        patch.setattr(sources, "read_records", changing)
        with pytest.raises(DataError, match="changed while it was read"):
            tokens(path)
    assert not list(cache.glob("*"))


def test_tokens_are_named_after_the_text_that_was_read_not_after_one_that_came_later(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": text} for text in documents(20)])
    data = TextDataModule(path=str(path), **TEXT)
    data.documents()
    later = [f"later {text}" for text in documents(20)]
    write(path, [{"text": text} for text in later])
    data.prepare(byte_tokenizer(), CausalLMCollator())
    assert np.concatenate(data.train_rows.values).tolist() == expected_tokens(documents(20))
    assert tokens(path) == expected_tokens(later)


def test_a_split_draws_the_rows_that_datasets_draws() -> None:
    table = datasets.Dataset.from_dict({"n": list(range(103))})
    theirs = table.train_test_split(0.1, seed=7)
    rest, held = sources.split_rows(table, 0.1, seed=7, path="x")
    assert (rest["n"][:], held["n"][:]) == (theirs["train"]["n"][:], theirs["test"]["n"][:])
    with pytest.raises(DataError, match=r"data\.val_fraction=0\.9 of 2 rows leaves none to train on"):
        sources.split_rows(table.select(range(2)), 0.9, seed=7, path="x")


def test_the_split_of_a_table_leaves_no_file_of_drawn_numbers(cache: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}+1=", "completion": str(i + 1)} for i in range(40)]
    data = PairsDataModule(path=str(write(tmp_path / "a.jsonl", rows)), **PAIRS)
    data.tables()
    assert [file.name.split("-")[0] for file in cache.iterdir()] == ["table"]


@pytest.mark.parametrize("damage", [slice(0), slice(0, 100), slice(0, -1)])
def test_damaged_answers_of_a_reference_are_asked_for_again(
    damage: slice, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "a.npz"
    known = {bytes([n] * 32): np.array([n, n + 0.5], np.float32) for n in range(3)}
    precompute.write_logprobs(file, known)
    assert {key: value.tolist() for key, value in precompute.read_logprobs(file).items()} == {
        key: value.tolist() for key, value in known.items()
    }
    file.write_bytes(file.read_bytes()[damage])
    assert precompute.read_logprobs(file) == {}
    assert "a.npz was damaged" in caplog.text


def test_the_seal_of_a_file_is_its_length_and_digest(tmp_path: Path) -> None:
    import xxhash

    path = tmp_path / "a"
    checksummed.write_checksummed(path, lambda temporary: temporary.write_bytes(b"contents"))
    assert path.read_bytes() == (
        b"contents" + b"sealed-1" + (8).to_bytes(8, "little") + xxhash.xxh3_128_digest(b"contents")
    )
    assert checksummed.read_checksummed(path) == b"contents"
    assert checksummed.find_damage(path) is None
