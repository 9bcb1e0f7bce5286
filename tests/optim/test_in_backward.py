"""Weights stepped during the backward pass: the weights, states and norms of the plain run."""

import csv
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from genai_pl.errors import ConfigError
from genai_pl.optim import StepInBackward, adamw
from genai_pl.strategies import ZeroStrategy
from genai_pl.training.trainer import check_in_backward
from tests.cli.test_commands import table
from tests.conftest import TINY

PLAIN = (*TINY, "trainer.gradient_clip_val=null", "callbacks.checkpoint.every_n_steps=2")


@pytest.mark.parametrize("optimizer", ["muon", "adamw", "sgd", "adafactor"])
def test_a_run_gives_the_losses_weights_and_states_of_the_plain_one(optimizer: str, command, tmp_path: Path) -> None:
    for name, options in (("plain", ()), ("early", ("trainer.optimizer_in_backward=true",))):
        result = command("train", *PLAIN, f"optimizer={optimizer}", *options, f"hydra.run.dir={name}")
        assert result.status == 0, result.err
    plain, early = (
        torch.load(tmp_path / n / "checkpoints" / "last.ckpt", weights_only=True) for n in ("plain", "early")
    )
    for name, value in plain["state_dict"].items():
        assert torch.equal(early["state_dict"][name], value), name
    theirs, ours = (run["optimizer_states"][0]["state"] for run in (plain, early))
    for n, state in theirs.items():
        assert all(torch.equal(torch.as_tensor(ours[n][k]), torch.as_tensor(v)) for k, v in state.items())
    assert early["lr_schedulers"] == plain["lr_schedulers"]
    for step, row in table(tmp_path / "plain").items():
        actual = table(tmp_path / "early")[step]
        assert float(actual.pop("train/grad_norm")) == pytest.approx(float(row.pop("train/grad_norm")), rel=1e-5)
        assert actual == row


def test_it_goes_on_exactly_after_a_stop(command, tmp_path: Path) -> None:
    options = (*PLAIN, "trainer.optimizer_in_backward=true")
    assert command("train", *options, "hydra.run.dir=whole").status == 0
    assert command("train", *options, "trainer.max_steps=2", "scheduler=constant", "hydra.run.dir=other").status == 0
    (tmp_path / "whole" / "checkpoints" / "last.ckpt").unlink()
    before = table(tmp_path / "whole")
    result = command("train", "resume=whole/checkpoints/step=000002.ckpt")
    assert result.status == 0, result.err
    assert table(tmp_path / "whole") == before


def test_no_two_gradients_exist_at_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    optimizer = adamw(model.named_parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    most = []
    stepper = StepInBackward(optimizer)
    for parameter in model.parameters():  # after the stepper's own hook
        parameter.register_post_accumulate_grad_hook(
            lambda _: most.append(sum(p.grad is not None for p in model.parameters()))
        )
    model(torch.ones(2, 4)).sum().backward()
    assert most == [0, 0, 0, 0]
    assert len(stepper.norms()) == 2
    assert stepper.norms() == [0, 0]


MISTAKES = {
    "trainer.gradient_clip_val=1.0": "set trainer.gradient_clip_val=null",
    "trainer.accumulate_grad_batches=2": "set trainer.accumulate_grad_batches=1",
    "strategy=fsdp": "is for one process",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_needs_all_gradients_is_refused_in_one_line(mistake: str, command) -> None:
    result = command("train", *PLAIN, "trainer.optimizer_in_backward=true", mistake)
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert MISTAKES[mistake] in result.err


def test_one_process_of_deepspeed_is_refused_too_whose_engine_needs_the_gradients() -> None:
    # without the package: what the check asks a run for
    trainer = SimpleNamespace(world_size=1, strategy=object.__new__(ZeroStrategy), precision_plugin=None)
    run = SimpleNamespace(module=SimpleNamespace(automatic_optimization=True), trainer=trainer)
    config = OmegaConf.create({"trainer": {"gradient_clip_val": None, "accumulate_grad_batches": 1}})
    with pytest.raises(ConfigError, match="is for one process"):
        check_in_backward(config, run)


@pytest.mark.parametrize(
    ("optimizer", "groups"),
    [("muon", {"matrices", "other_decay", "other_no_decay"}), ("adamw", {"decay", "no_decay"})],
)
def test_each_group_has_its_norm_and_together_they_are_the_whole(optimizer: str, groups: set[str], command) -> None:
    assert command("train", *TINY, f"optimizer={optimizer}", "hydra.run.dir=run").status == 0
    with Path("run/metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {k.rpartition("/")[2] for k in rows[0] if k.startswith("train/grad_norm/")} == groups
    for row in rows:
        parts = [float(row[f"train/grad_norm/{group}"]) for group in groups]
        assert sum(x * x for x in parts) ** 0.5 == pytest.approx(float(row["train/grad_norm"]), rel=1e-5)
