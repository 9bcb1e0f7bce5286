"""Runs with experts as commands: training, exact resume, export, upcycling, and mistakes in one line."""

import csv
from pathlib import Path

import pytest
import torch

from tests.conftest import TINY

EXPERTS = (*TINY, "model=moe_nano", "model.n_head=4", "model.n_experts=3", "model.expert_size=16", "data.workers=0")


def table(run: str) -> list[dict[str, str]]:
    with (Path(run) / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_run_reports_its_load_resumes_exactly_and_exports_what_transformers_loads(command) -> None:
    from transformers import AutoModelForCausalLM

    from genai_pl.loading import load

    # three steps up or down cannot cancel out
    options = (*EXPERTS, "model.balance_bias=0.01", "model.router_z_loss=0.001", "trainer.max_steps=3")
    result = command("train", *options, "hydra.run.dir=whole")
    assert result.status == 0, result.err
    assert "active per token): decoder, 1 layers, 3 experts in 1" in result.out
    rows = [row for row in table("whole") if row["train/loss"]]
    assert all(float(row["train/expert_load"]) >= 1.0 <= float(row["train/balance_loss"]) + 0.5 for row in rows)
    # the biases are part of the checkpoint
    assert command("train", *options, "hydra.run.dir=part", "trainer.max_steps=2").status == 0
    assert command("train", "resume=part", "trainer.max_steps=3").status == 0
    whole, part = load("whole").model, load("part/checkpoints/last.ckpt").model
    assert whole.blocks[0].mlp.balance_bias.all()
    assert part.blocks[0].mlp.balance_bias.all()
    ids = torch.arange(10, 30)[None]
    # without a bias the folder is one of transformers
    assert command("train", *EXPERTS, "hydra.run.dir=plain").status == 0
    theirs, ours = AutoModelForCausalLM.from_pretrained("plain/model"), load("plain").model
    assert type(theirs).__name__ == "Qwen3MoeForCausalLM"
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=0, atol=1e-5)
        assert whole(ids).shape == part(ids).shape
    assert command("generate", "checkpoint=plain", "prompt=a", "generation.max_new_tokens=4").status == 0


def test_a_dense_run_is_upcycled_and_begins_at_its_loss(command) -> None:
    dense = (*TINY, "model.n_head=4", "data.workers=0")
    assert command("train", *dense, "hydra.run.dir=dense").status == 0
    more = (
        "init_from=dense",
        "trainer.max_steps=1",
        *(o for o in dense if not o.startswith(("model.", "tok", "trainer.max_steps"))),
    )
    assert command("train", *more, "hydra.run.dir=same").status == 0
    result = command("train", *more, "model.n_experts=4", "model.router=sigmoid", "hydra.run.dir=mixture")
    assert result.status == 0, result.err
    assert "upcycled" in result.out
    first, second = (float(table(run)[0]["train/loss"]) for run in ("same", "mixture"))
    assert second == pytest.approx(first, rel=1e-5)
    wrong = command("train", *more, "model.n_experts=4", "model.expert_size=7")
    assert wrong.status in (1, 2)
    assert wrong.err.strip().splitlines()[-1].startswith("error: model.expert_size=7")
    planned = command("train", *more, "model.n_experts=4", "dry_run=true", "plan=cpu")
    assert planned.status == 0, planned.err
    assert "active per token" in planned.out


def test_options_of_experts_without_experts_are_reported(command) -> None:
    result = command(
        "train", *TINY, "model.n_head=4", "data.workers=0", "model.router=sigmoid", "dry_run=true", "plan=cpu"
    )
    assert "model.router=sigmoid: has no effect: model.n_experts=null" in result.out + result.err


def test_onnx_refuses_experts_in_one_line(command) -> None:
    assert command("train", *EXPERTS, "trainer.max_steps=1", "hydra.run.dir=run").status == 0
    result = command("export", "checkpoint=run", "format=onnx", "out=onnx")
    assert result.status in (1, 2)
    assert "model.n_experts" in result.err.strip().splitlines()[-1]
