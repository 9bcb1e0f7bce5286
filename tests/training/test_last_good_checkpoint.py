"""The last good checkpoint of a run that diverges is good."""

import math
from pathlib import Path

import pytest
import torch

from genai_pl.checkpoints.file import read_checkpoint
from tests.conftest import TINY

RUN = ("train", *TINY, "scheduler.warmup_steps=3", "callbacks.checkpoint.every_n_steps=1", "hydra.run.dir=run")


def losses(path: Path) -> list[float]:
    """The loss of the weights of a checkpoint on some tokens, by transformers' GPT-like arithmetic in plain torch."""
    from genai_pl.loading import load

    model = load(str(path)).model
    ids = torch.arange(32)[None] % 256
    with torch.no_grad():
        return [torch.nn.functional.cross_entropy(model(ids)[0, :-1], ids[0, 1:]).item()]


@pytest.mark.parametrize("keep", [1, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("lr", ["1e38", "1e15", "1e9"])
def test_the_last_good_checkpoint_of_a_run_that_diverges_gives_a_finite_loss(lr: str, keep: int, command) -> None:
    result = command(*RUN, f"optimizer.lr={lr}", f"callbacks.checkpoint.keep={keep}")
    assert result.status == 1
    (line,) = result.err.splitlines()
    assert line.endswith("; last good checkpoint: run/checkpoints/last.ckpt")
    last = Path("run/checkpoints/last.ckpt")
    assert read_checkpoint(last)["global_step"] == 1  # the first step of warmup moves nothing
    assert all(math.isfinite(loss) and loss < 7 for loss in losses(last))
    again = command("train", "resume=run", "optimizer.lr=1e-3")
    assert again.status == 0, again.err


@pytest.mark.parametrize("validates", [0, 2])
def test_a_run_whose_last_step_ruins_its_weights_fails_and_exports_nothing(validates: int, command) -> None:
    result = command(
        *RUN,
        "optimizer.lr=1e38",
        "trainer.max_steps=2",
        f"trainer.limit_val_batches={validates}",
        "trainer.max_steps=2",
    )
    assert result.status == 1
    (line,) = result.err.splitlines()
    assert line.endswith("; last good checkpoint: run/checkpoints/last.ckpt")
    assert read_checkpoint(Path("run/checkpoints/last.ckpt"))["global_step"] == 1
    assert not Path("run/model").exists()


def test_a_validation_without_a_finite_loss_sets_the_checkpoint_of_its_step_aside(command) -> None:
    result = command(*RUN, "optimizer.lr=1e15", "trainer.max_steps=2")
    assert result.status == 1
    assert (
        "the validation loss is not finite after step 2 (run/checkpoints/aside-step=000002.ckpt is set aside)"
        in result.err
    )
    names = sorted(path.name for path in Path("run/checkpoints").iterdir())
    assert names == ["aside-step=000002.ckpt", "last.ckpt", "step=000001.ckpt"]


def test_one_checkpoint_is_kept_where_one_is_asked_for_once_a_loss_has_confirmed_it(command) -> None:
    assert command(*RUN, "callbacks.checkpoint.keep=1").status == 0
    assert sorted(path.name for path in Path("run/checkpoints").iterdir()) == ["last.ckpt", "step=000004.ckpt"]
