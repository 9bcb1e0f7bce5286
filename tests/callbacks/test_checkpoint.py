"""Checkpoints on disk: complete or absent, the newest few, and nothing but data."""

import errno
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from genai_pl.atomic_io import CONTENTS
from genai_pl.callbacks import newest_checkpoints
from genai_pl.callbacks.checkpoint import StepCheckpoint, _rng_state, _set_rng
from genai_pl.checkpoints.file import read_checkpoint, write_checkpoint
from genai_pl.errors import CheckpointError, TrainingError

GOOD = {"genai_pl": {"format": 1}, "state_dict": {"w": torch.arange(1000.0)}, "global_step": 7}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write_checkpoint(GOOD, tmp_path / "a.ckpt")
    assert torch.equal(read_checkpoint(tmp_path / "a.ckpt")["state_dict"]["w"], GOOD["state_dict"]["w"])
    assert [p.name for p in tmp_path.iterdir()] == ["a.ckpt"]


def test_a_full_disk_leaves_the_old_checkpoint_and_no_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.ckpt"
    write_checkpoint(GOOD, path)

    def fail(contents: dict, file) -> None:
        file.write(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(TrainingError, match=r"a\.ckpt: the checkpoint could not be written, the disk is full"):
        write_checkpoint({}, path)
    assert [p.name for p in tmp_path.iterdir()] == ["a.ckpt"]
    assert read_checkpoint(path)["global_step"] == 7


@pytest.mark.parametrize("cut", [0, 1, 100, 2000, -1])
def test_every_truncation_is_refused(cut: int, tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    write_checkpoint(GOOD, path)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(CheckpointError, match=r"a\.ckpt: refused"):
        read_checkpoint(path)


@pytest.mark.parametrize("where", ["genai_pl", "hyper_parameters"])
def test_a_stored_target_is_refused_however_deep_it_lies(where: str, tmp_path: Path) -> None:
    torch.save(
        {**GOOD, where: {"a": [{"_target_": "os.system"}]}, "genai_pl": {"x": ({"_target_": "f"},)}},
        tmp_path / "a.ckpt",
    )
    with pytest.raises(CheckpointError, match="names code to run"):
        read_checkpoint(tmp_path / "a.ckpt")


def test_random_numbers_go_on_where_they_were_also_through_a_file(tmp_path: Path) -> None:
    import random

    import numpy as np

    def draw() -> tuple:
        return torch.rand(3).tolist(), random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn()

    draw()
    torch.save(_rng_state(), tmp_path / "rng")
    expected = draw()
    _set_rng(torch.load(tmp_path / "rng", weights_only=True))
    assert draw() == expected


def test_checkpoints_are_listed_newest_first_and_a_link_only_once(tmp_path: Path) -> None:
    import os

    for i, name in enumerate(("step=000005.ckpt", "step=000010.ckpt")):
        (tmp_path / name).write_text("x")
        os.utime(tmp_path / name, (i, i))
    os.link(tmp_path / "step=000010.ckpt", tmp_path / "last.ckpt")
    actual = newest_checkpoints(tmp_path)
    assert len(actual) == 2
    assert actual[0].samefile(tmp_path / "step=000010.ckpt")
    assert actual[1].name == "step=000005.ckpt"


def test_a_thread_that_writes_and_the_training_remove_old_checkpoints_in_turn(tmp_path: Path) -> None:
    for _ in range(10):
        for step in range(5):
            folder = tmp_path / f"step={step:06d}.ckpt"
            folder.mkdir(exist_ok=True)
            for name in (CONTENTS, *map(str, range(100))):
                (folder / name).touch()
        callback = StepCheckpoint(str(tmp_path), every_n_steps=1, keep=1)
        callback.written(folder)
        with ThreadPoolExecutor() as threads:
            for removal in [threads.submit(callback._keep_newest, n) for n in (2, 1, 2, 1)]:
                removal.result()
        assert [path.name for path in tmp_path.glob("step=*")] == [folder.name]
