"""Disks that refuse: one line that names the path and the last good checkpoint, and nothing earlier is lost."""

import errno
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models

from genai_pl.atomic_io import write_atomic
from genai_pl.callbacks import Console
from genai_pl.errors import CheckpointError, DataError, system_error, system_line
from tests.conftest import TINY

RUN = ("train", *TINY, "callbacks.checkpoint.every_n_steps=1", "hydra.run.dir=run")


def copy_tree(folder: Path) -> None:
    source = folder.with_name("source")
    source.mkdir()
    (source / "file").write_bytes(bytes(3000))
    limit_files(SMALL)
    shutil.copytree(source, folder)


def arrow_stream(path: Path) -> None:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, pa.schema([("a", pa.int64())])) as writer:
        writer.write_batch(pa.record_batch([pa.array(range(10_000))], names=["a"]))


def save_into(path: Path) -> None:
    with path.open("wb") as file:
        torch.save({"a": torch.ones(10_000)}, file)


def save_arrays(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, a=np.ones(10_000))


def limit_files(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


SMALL = 1000  # bytes that a file may have: more are refused, as a full disk refuses them
WRITERS: dict[str, Callable[[Path], object]] = {
    "python": lambda path: path.write_text("text" * 1000),
    "safetensors": lambda path: save_file({"a": torch.ones(10_000)}, path),
    "tokenizers": lambda path: Tokenizer(models.WordLevel({str(n): n for n in range(1000)}, "0")).save(str(path)),
    "torch": save_into,
    "numpy": save_arrays,
    "pyarrow": arrow_stream,
    "shutil": copy_tree,
}


@pytest.mark.parametrize("library", WRITERS)
def test_what_a_disk_refuses_is_the_same_error_whatever_library_meets_it(library: str, tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if library != "shutil":
        limit_files(SMALL)
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            write_atomic(tmp_path / "target", WRITERS[library])
    finally:
        limit_files(before)
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(tmp_path / "target"))
    assert [path for path in tmp_path.iterdir() if path.name != "source"] == []


def test_an_error_that_hides_none_of_the_system_is_left_alone() -> None:
    refused = CheckpointError("x: no such file")
    refused.__context__ = FileNotFoundError(errno.ENOENT, "No such file or directory", "x")
    assert system_error(refused) is None
    assert system_error(DataError("(os error 28)")) is None
    assert system_error(ValueError("os error 28")) is None
    assert system_error(OSError("without a number")) is None


def test_a_line_names_the_path_as_it_would_be_typed_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = str(tmp_path / "run" / "a")
    assert system_line(OSError(errno.ENOSPC, "No space left on device", path)) == "run/a: the disk is full"
    assert (
        system_line(OSError(errno.EROFS, "Read-only file system", os.fsencode(path))) == "run/a: Read-only file system"
    )
    assert (
        system_line(OSError(errno.EROFS, "Read-only file system", "/elsewhere")) == "/elsewhere: Read-only file system"
    )


def at_step_3(monkeypatch: pytest.MonkeyPatch, action: Callable[[], object]) -> None:
    """Do something to the folder of a run in its middle."""
    show = Console.show

    def shown(self: Console, step: int, metrics: dict[str, float]) -> None:
        show(self, step, metrics)
        if step == 3:
            action()

    monkeypatch.setattr(Console, "show", shown)


def refuse(path: str) -> Callable[..., None]:
    """A writer on a full disk."""

    def write(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    return write


def remove(path: str) -> None:
    while Path(path).exists():  # a thread may write into it meanwhile
        shutil.rmtree(path, ignore_errors=True)


def replace_by_folder(path: str) -> None:
    Path(path).unlink()
    Path(path, "something").mkdir(parents=True)


def fails_in_rust(*_: object, **__: object) -> None:
    from safetensors import SafetensorError

    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


CASES = {
    "deleted events": ("run/tensorboard/events", "No such file or directory"),
    "a folder in place of the table": ("run/metrics.csv", "Is a directory"),
    "the model": ("run/model", "the disk is full"),
    "the results": ("run/results.json", "the disk is full"),
    "a checkpoint": ("run/checkpoints/step=000003.ckpt", "the disk is full"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_a_disk_refuses_in_a_run_is_one_line_with_the_last_good_checkpoint(
    case: str, command, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        if case == "deleted events":
            at_step_3(patch, lambda: remove("run/tensorboard"))
        elif case == "a folder in place of the table":
            at_step_3(patch, lambda: replace_by_folder("run/metrics.csv"))
        elif case == "the model":
            patch.setattr("safetensors.torch.save_file", fails_in_rust)
        elif case == "the results":
            patch.setattr("genai_pl.training.fit.write_results", refuse("run/results.json"))
        else:
            at_step_3(patch, lambda: patch.setattr(torch, "save", refuse("run/checkpoints/.temporary")))
        result = command(*RUN)
    path, reason = CASES[case]
    assert result.status == 1
    (line,) = result.err.splitlines()
    assert line.startswith(f"error: {path}")
    assert reason in line
    assert line.endswith("; last good checkpoint: run/checkpoints/last.ckpt")
    assert Path("run/train.log").read_text().splitlines()[-1] == line
    if case == "a folder in place of the table":
        shutil.rmtree("run/metrics.csv")
    again = command("train", "resume=run")
    assert again.status == 0, again.err
    assert Path("run/model/model.safetensors").is_file()


def test_a_run_goes_on_without_its_log_and_says_so_once(command, monkeypatch: pytest.MonkeyPatch) -> None:
    at_step_3(monkeypatch, lambda: replace_by_folder("run/train.log"))
    result = command(*RUN)
    assert result.status == 0
    assert result.err == "log         run/train.log: Is a directory; the log of this run ends here\n"


def test_a_cache_that_cannot_be_written_is_one_line_and_leaves_no_folder(
    command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import datasets

    (tmp_path / "cache").write_text("a file where a folder should be")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    result = command(*RUN)
    assert (result.status, result.err) == (1, "error: cache/genai_pl: Not a directory\n")
    assert not Path("run").exists()


@pytest.mark.parametrize("made_by", ["evaluate", "export"])
def test_what_other_commands_write_is_refused_in_one_line_too(made_by: str, command, tmp_path: Path) -> None:
    assert command(*RUN).status == 0
    (tmp_path / "file").touch()
    (tmp_path / "texts.jsonl").write_text('{"text": "one text"}\n' * 4)
    options = ("data.path=texts.jsonl",) if made_by == "evaluate" else ()
    result = command(made_by, "checkpoint=run", *options, "out=file/inside")
    assert result.status in (1, 2)
    (line,) = result.err.splitlines()
    assert line.startswith("error: ")
    assert "file" in line
    assert "Not a directory" in line or "exists" in line
