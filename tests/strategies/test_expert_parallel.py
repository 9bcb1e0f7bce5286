"""Processes that hold the experts of a mixture between them take the steps of one, and refuse what they cannot divide."""

import json
from pathlib import Path

import pytest

from tests.strategies.processes import SAME, SMALL, assert_same, train

MIXTURE = (
    "model=moe_nano", "model.n_experts=4", "model.expert_size=16", "model.n_shared_experts=1", "model.balance_loss=0.1",
    "model.balance_bias=0.01", "model.router_z_loss=0.01", "model.bias=true", "trainer.gradient_clip_val=0.05",
)  # fmt: skip
# auxiliary losses are defined on micro-batches: one row each, of one process in turn or of four at once
ONE_ROW = "data.batch_size=1"
OBJECTIVES = {
    "clm": MIXTURE,
    "adamw": (*MIXTURE, "optimizer=adamw", "optimizer.lr=1e-3", "optimizer.eps=1e-3"),
    "muon": (*MIXTURE, "optimizer=muon", "optimizer.lr=1e-3", "optimizer.eps=1e-3"),
    "sft": (*MIXTURE, "objective=sft", "data.path=chat.jsonl"),
}
NAMES = (*SAME, "train/expert_load", "train/expert_load/layer_1", "train/balance_loss", "train/router_z_loss")


def accumulated(processes: int) -> tuple[str, ...]:
    """Options for four rows to a step, one at a time in each process."""
    share = 4 // processes
    accumulate, validated = f"trainer.accumulate_grad_batches={share}", f"data.val_batch_size={share}"
    return (ONE_ROW, f"trainer.devices={processes}", accumulate, validated)


@pytest.fixture(scope="module")
def one(folder: Path):
    """The run of one process for an objective, trained once."""
    talks = [f"{a} {b}" for a in ("to be", "or not", "that is") for b in ("the question", "to be", "or not to be so")]
    rows = [{"prompt": talk, "completion": talk[: 3 + n]} for n, talk in enumerate(talks * 8)]
    (folder / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def get(objective: str) -> Path:
        run = folder / f"{objective}-one"
        if not run.exists():
            train(folder, *SMALL, *OBJECTIVES[objective], *accumulated(1), f"hydra.run.dir={run}")
        return run

    return get


LAYOUTS = {
    "two": (2, "strategy.expert_parallel_size=2"),
    "four": (4, "strategy.expert_parallel_size=4"),
    "shards of experts": (4, "strategy.expert_parallel_size=2"),
    "copies": (4, "strategy.expert_parallel_size=2", "strategy.replicate_size=2"),
    "copies of everything else": (4, "strategy.expert_parallel_size=4", "strategy.replicate_size=4"),
    "recomputed": (2, "strategy.expert_parallel_size=2", "trainer.recompute=full"),
}
CASES = [("clm", "two")]


@pytest.mark.parametrize(
    ("objective", "layout"),
    [
        pytest.param(objective, layout, marks=() if (objective, layout) in CASES else pytest.mark.slow)
        for objective, layout in [
            *(("clm", layout) for layout in LAYOUTS),
            *(("sft", layout) for layout in ("two", "four")),
            *((name, layout) for name in ("adamw", "muon") for layout in ("two", "shards of experts")),
        ]
    ],
)
def test_processes_that_divide_experts_take_the_steps_of_one(objective: str, layout: str, folder: Path, one) -> None:
    expected, (n, *options) = one(objective), LAYOUTS[layout]
    run = folder / f"{objective}-{list(LAYOUTS).index(layout)}"
    given = (*OBJECTIVES[objective], "trainer=fsdp", *options, *accumulated(n))
    train(folder, *SMALL, *given, f"hydra.run.dir={run}")
    assert_same(run, expected, names=NAMES)
