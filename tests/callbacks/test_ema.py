"""Averaged weights: equal to a loop over the same checkpoints, validated, exported and resumed."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.cli.test_commands import table
from tests.conftest import TINY

LR = ("optimizer=adamw", "optimizer.lr=1e-2", "scheduler=constant", "scheduler.warmup_steps=0")
JOB = (*TINY, *LR, "trainer.max_steps=6", "callbacks.checkpoint.every_n_steps=1", "callbacks.checkpoint.keep=9")
EMA = ("callbacks=ema", "callbacks.extra.ema.decay=0.5")


def weights(run: Path, step: int, kind: str = "state_dict") -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints" / f"step={step:06d}.ckpt", weights_only=True)[kind]


def test_the_mean_is_saved_validated_and_exported_beside_the_weights_of_a_plain_run(command, tmp_path: Path) -> None:
    assert command("train", *JOB, "hydra.run.dir=plain").status == 0
    result = command("train", *JOB, *EMA, "hydra.run.dir=mean")
    assert result.status == 0, result.err
    plain, run = tmp_path / "plain", tmp_path / "mean"
    expected = weights(plain, 1)
    for step in range(2, 7):
        expected = {k: 0.5 * expected[k] + 0.5 * v for k, v in weights(plain, step).items()}
    for name, value in weights(run, 6).items():
        torch.testing.assert_close(value, expected[name])
    for name, value in weights(run, 6, "current_model_state").items():
        assert torch.equal(value, weights(plain, 6)[name])
    exported = load_file(run / "model" / "model.safetensors")
    torch.testing.assert_close(exported["model.embed_tokens.weight"], expected["model.embed.weight"])
    losses = [float(table(p)[6]["val/loss"]) for p in (plain, run)]
    assert losses[0] != losses[1]
    evaluated = command("evaluate", "checkpoint=mean", "data.path=shakespeare", "limit=8", "batch_tokens=256")
    assert evaluated.status == 0, evaluated.err


@pytest.mark.parametrize("peft", [(), pytest.param(("peft=lora",), marks=pytest.mark.slow)], ids=["whole", "lora"])
def test_a_resumed_mean_is_that_of_a_run_that_never_stopped(peft: tuple[str, ...], command, tmp_path: Path) -> None:
    assert command("train", *JOB, *EMA, *peft, "hydra.run.dir=whole").status == 0
    assert command("train", *JOB, *EMA, *peft, "trainer.max_steps=3", "hydra.run.dir=halves").status == 0
    result = command("train", "resume=halves", "trainer.max_steps=6")
    assert result.status == 0, result.err
    for kind in ("state_dict", "current_model_state"):
        for name, value in weights(tmp_path / "halves", 6, kind).items():
            assert torch.equal(value, weights(tmp_path / "whole", 6, kind)[name]), name
    assert table(tmp_path / "halves")[6] == table(tmp_path / "whole")[6]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("strategy=fsdp",), "callbacks=ema needs the whole model"),
        (("callbacks.extra.ema.decay=1",), "below 1"),
        (("callbacks=default",), "callbacks.extra.ema: no callback"),
    ],
)
def test_a_mean_that_cannot_be_had_is_one_line(options: tuple[str, ...], said: str, command) -> None:
    result = command("train", *JOB, *EMA, *options)
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert said in result.err


def test_a_run_of_means_does_not_go_on_from_them_as_if_they_were_its_weights(command) -> None:
    assert command("train", *JOB, "callbacks=ema", "trainer.max_steps=2", "hydra.run.dir=run").status == 0
    result = command("train", "resume=run", "callbacks=default", "trainer.max_steps=3")
    assert result.status == 2
    assert result.err.endswith(
        "error: callbacks: the run keeps means of its weights, and goes on with callbacks=ema only\n"
    )
