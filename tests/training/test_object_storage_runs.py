"""Runs whose data, copy and initial weights are in object storage: here in fsspec's memory, as in any other storage."""

import json
from pathlib import Path

import fsspec
import pytest

from tests.conftest import TINY, Result
from tests.strategies.processes import MODEL, assert_equal_to_the_last_bit, write_documents

OPTIONS = (*TINY, "trainer.max_steps=8", "callbacks.checkpoint.every_n_steps=2", "logger=csv", "model.dropout=0.1")
DATA = ("data.path=memory://bucket/texts", "data.streaming=true")
COPY = "callbacks.checkpoint.dirpath=memory://bucket/run"


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> fsspec.AbstractFileSystem:
    system = fsspec.filesystem("memory")
    monkeypatch.setattr(type(system), "store", {})
    monkeypatch.setattr(type(system), "pseudo_dirs", [""])
    monkeypatch.setenv("HF_HOME", str(tmp_path / ".cache"))
    texts = [json.dumps({"text": f"Document {n} says {n * n}. " * 10}) for n in range(120)]
    for part in range(2):
        system.pipe(f"/bucket/texts/{part}.jsonl", "\n".join(texts[60 * part : 60 * part + 60]).encode())
    return system


@pytest.fixture
def first(command, memory) -> Result:
    """A run with a copy, of streamed data."""
    done = command("train", *OPTIONS, *DATA, COPY, "output_dir=first", "callbacks.checkpoint.keep=2")
    assert done.status == 0, done.err
    return done


def test_a_run_whose_machine_is_lost_goes_on_from_its_copy(command, memory, first: Result, tmp_path: Path) -> None:
    assert "copy        memory://bucket/run" in first.out
    copied = {name.removeprefix("/bucket/run/"): memory.cat(name) for name in memory.store if "/run/" in name}
    assert {name for name in copied if name.startswith("checkpoints/")} == {
        "checkpoints/step=000006.ckpt",
        "checkpoints/step=000008.ckpt",
    }
    for name, contents in copied.items():  # the log ends with the line that says so
        assert (tmp_path / "first" / name).read_bytes().startswith(contents)
    # lost in the middle of a checkpoint: the one before it counts
    memory.pipe("/bucket/run/checkpoints/step=000008.ckpt", copied["checkpoints/step=000008.ckpt"][:5000])
    once_more = ("resume=auto", COPY, *DATA)
    again = command("train", *once_more)
    assert again.status == 0, again.err
    assert "fetching    memory://bucket/run to outputs/run" in again.out
    assert "step=000008.ckpt: refused" in again.err
    assert "resuming    outputs/run/checkpoints/step=000006.ckpt" in again.out
    assert_equal_to_the_last_bit(tmp_path / "outputs" / "run", tmp_path / "first", MODEL)
    # the same command at the next start, the local folder being there
    assert "already at step 8" in command("train", *once_more).out
    # the copy is of one run: neither another run nor another folder takes it
    other = command("train", *OPTIONS, *DATA, COPY, "output_dir=other")
    assert "memory://bucket/run: holds a run already; continue it with resume=memory://bucket/run" in other.err
    assert not (tmp_path / "other").exists()
    foreign = command("train", "resume=memory://bucket/run", "output_dir=first/checkpoints/..", *DATA)
    assert foreign.status == 0  # the folder that it was copied from
    memory.copy("/bucket/run/", "/bucket/second", recursive=True)
    foreign = command("train", "resume=memory://bucket/second", "output_dir=first", *DATA)
    assert "error: first: holds another run than memory://bucket/second" in foreign.err


@pytest.mark.slow
def test_models_in_object_storage_are_those_of_the_folder(command, memory, first: Result, tmp_path: Path) -> None:
    options = ("prompt=Document", "generation=greedy", "generation.max_new_tokens=8")
    expected = command("generate", "checkpoint=first", *options).out
    for name in ("run", "run/model", "run/last", "run/checkpoints/step=000008.ckpt"):
        assert command("generate", f"checkpoint=memory://bucket/{name}", *options).out == expected
    # a changed file is fetched again
    memory.copy("/bucket/run/checkpoints/step=000006.ckpt", "/bucket/run/checkpoints/step=000009.ckpt")
    memory.pipe("/bucket/run/checkpoints/step=000009.ckpt", memory.cat("/bucket/run/checkpoints/step=000006.ckpt"))
    earlier = command("generate", "checkpoint=first/checkpoints/step=000006.ckpt", *options).out
    assert command("generate", "checkpoint=memory://bucket/run", *options).out == earlier
    # weights to start from, and an adapter on them
    lora = ("peft=lora", "init_from=memory://bucket/run/model", "objective=clm", "output_dir=lora")
    done = command("train", *TINY[4:], *lora, *DATA, "callbacks.checkpoint.dirpath=memory://bucket/lora")
    assert done.status == 0, done.err
    with_adapter = command("generate", "checkpoint=memory://bucket/run/model", "adapter=memory://bucket/lora", *options)
    assert with_adapter.out == command("generate", "checkpoint=lora", *options).out


@pytest.mark.slow
def test_a_sharded_checkpoint_is_copied_and_fetched_with_all_its_shards(command, memory, tmp_path: Path) -> None:
    write_documents(tmp_path)
    local = ("data.path=documents.jsonl", "data.batch_size=2", "optimizer=adamw", "trainer.accelerator=cpu")
    sharded = ("trainer=fsdp", "trainer.devices=2", "strategy.sharded_checkpoints=true")
    done = command("train", *OPTIONS, *local, *sharded, COPY, "output_dir=first")
    assert done.status == 0, done.err
    newest = "/bucket/run/checkpoints/step=000008.ckpt"
    there = {name.removeprefix(f"{newest}/") for name in memory.store if name.startswith(newest)}
    assert there == {path.name for path in (tmp_path / "first/checkpoints/step=000008.ckpt").iterdir()}
    memory.rm_file(f"{newest}/contents.pt")  # as if its copy had been cut off: the file that makes it one comes last
    again = command("train", "resume=memory://bucket/run", "output_dir=second")
    assert "resuming    second/checkpoints/step=000006.ckpt" in again.out, again.err
    assert_equal_to_the_last_bit(tmp_path / "second", tmp_path / "first", MODEL)


@pytest.mark.parametrize(
    ("arguments", "line"),
    {
        ("data.path=memory://bucket/none",): "data.path=memory://bucket/none: no such file or folder",
        ("data.path=s4://bucket/none",): "data.path=s4://bucket/none: no such kind of storage; known are s3://, gs://",
        ("init_from=memory://bucket/none",): "init_from=memory://bucket/none: no such file or folder",
        (
            "resume=memory://bucket/none",
        ): "resume=memory://bucket/none: no checkpoint in memory://bucket/none/checkpoints",
        (
            "-m",
            "resume=memory://bucket/run",
            "seed=1,2",
        ): "resume=memory://bucket/run: a copy is of one run; a sweep goes",
        (
            "output_dir=memory://bucket/run",
        ): "output_dir=memory://bucket/run: not a folder of this machine; callbacks.check",
        (
            "callbacks.checkpoint.dirpath=elsewhere",
        ): "dirpath=elsewhere: expected an address such as s3://BUCKET/RUN or null",
    }.items(),
)
def test_a_wrong_address_is_one_line(command, memory, arguments: tuple[str, ...], line: str, tmp_path: Path) -> None:
    result = command("train", *TINY, *arguments)
    assert result.status
    assert line in result.err
    assert "Traceback" not in result.err
    assert not any(path.is_dir() and path.name != ".cache" for path in tmp_path.iterdir())
