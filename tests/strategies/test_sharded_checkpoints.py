"""Sharded checkpoints, as far as one process can test them: written, read, and refused where damaged."""

import os
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from genai_pl.checkpoints.file import MARK, read_checkpoint, read_contents
from genai_pl.checkpoints.sharded import ShardedSaver
from genai_pl.errors import CheckpointError


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    """A run of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def checkpoint() -> dict:
    torch.manual_seed(0)
    weight = torch.randn(5, 3)
    moments = {"step": torch.tensor(7.0), "exp_avg": torch.randn(5, 3), "exp_avg_sq": torch.rand(5, 3).bfloat16()}
    groups = [{"lr": 0.1, "betas": (0.9, 0.99), "params": [0]}]
    return {
        "global_step": 7,
        "state_dict": {"model.embed.weight": weight, "model.lm_head.weight": weight, "model.bias": torch.ones(1)},
        "optimizer_states": [{"state": {0: moments}, "param_groups": groups}],
        MARK: {"format": 1, "rng": []},
    }


@pytest.fixture(params=[False, True], ids=["at once", "later"])
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    saver, path = ShardedSaver(asynchronous=request.param), tmp_path / "step=000007.ckpt"
    contents, written = checkpoint(), []
    saver.save(contents, path, written.append)
    for value in [*contents["state_dict"].values(), contents["optimizer_states"][0]["state"][0]["step"]]:
        value.zero_()  # the run goes on
    saver.wait()
    assert written == [path]
    return path


def test_what_is_read_is_what_was_there_when_it_was_saved(saved: Path) -> None:
    actual, right = read_checkpoint(saved), checkpoint()
    assert actual.keys() == right.keys()
    for name, value in right["state_dict"].items():
        assert torch.equal(actual["state_dict"][name], value)
    (state,), (expected,) = actual["optimizer_states"], right["optimizer_states"]
    assert state["param_groups"] == expected["param_groups"]
    for name, value in expected["state"][0].items():
        assert torch.equal(state["state"][0][name], value)
        assert state["state"][0][name].dtype == value.dtype


def test_a_tied_weight_is_written_once(saved: Path) -> None:
    (file,) = saved.glob("*.safetensors")
    stored = load_file(file)
    assert sorted(stored) == [
        "model.bias",
        "model.embed.weight",
        "optimizer.0.0.exp_avg",
        "optimizer.0.0.exp_avg_sq",
    ]
    contents = read_contents(saved)
    assert contents["state_dict"]["model.lm_head.weight"] == "model.embed.weight"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


class Code:
    """What a pickled checkpoint could hold: makes a folder `ran` as it is read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.folder / "ran"),)


DAMAGES = {
    "a shard is gone": lambda folder, file: file.unlink(),
    "a shard is truncated": lambda folder, file: cut(file),
    "the rest is cut": lambda folder, file: cut(folder / "contents.pt"),
    "the rest is code": lambda folder, file: (folder / "contents.pt").write_bytes(pickle.dumps(Code(folder))),
    "no list of tensors": lambda folder, file: torch.save({MARK: {}, "state_dict": {"a": "b"}}, folder / "contents.pt"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused_in_one_line(damage: str, saved: Path) -> None:
    (file,) = saved.glob("*.safetensors")
    DAMAGES[damage](saved, file)
    with pytest.raises(CheckpointError, match="refused") as error:
        read_contents(saved)
    assert "\n" not in str(error.value)
    assert not (saved / "ran").exists()


def test_metadata_of_dcp_that_holds_code_are_not_read(saved: Path) -> None:
    (saved / ".metadata").write_bytes(pickle.dumps(Code(saved)))
    assert read_checkpoint(saved)["global_step"] == 7
    assert not (saved / "ran").exists()
