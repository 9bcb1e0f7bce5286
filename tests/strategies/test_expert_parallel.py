"""Processes that hold the experts of a mixture between them take the steps of one, and refuse what they cannot divide."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from genai_pl.distributed.dtensor import local_shard
from genai_pl.errors import ConfigError
from genai_pl.models import ModelConfig, build_model, n_parameters
from genai_pl.peft import lora
from genai_pl.planning.cost_model import Layout, Share, memory
from genai_pl.planning.count import expert_parameters, largest_part
from genai_pl.strategies import ShardedStrategy
from genai_pl.strategies.expert_parallel import check_experts, expert_mesh
from tests.small_models import LLAMA
from tests.strategies.processes import SAME, SMALL, assert_same, start, train

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


@pytest.mark.slow
@pytest.mark.parametrize("saved", [(), ("strategy.sharded_checkpoints=true",)], ids=["file", "shards"])
def test_a_run_goes_on_with_other_numbers_of_processes(saved: tuple[str, ...], folder: Path, one) -> None:
    run, two = folder / f"resumed{len(saved)}", LAYOUTS["two"][1]
    given = (*OBJECTIVES["adamw"], "trainer=fsdp", two, *saved, *accumulated(2), "trainer.max_steps=2")
    train(folder, *SMALL, *given, f"hydra.run.dir={run}")
    # four processes, then one without a strategy
    four = ("strategy=fsdp", *LAYOUTS["shards of experts"][1:], *saved, *accumulated(4), "trainer.max_steps=3")
    train(folder, f"resume={run.name}", *four)
    train(folder, f"resume={run.name}", "strategy=auto", *accumulated(1), "trainer.max_steps=4")
    assert_same(run, one("adamw"), names=("train/loss", "train/grad_norm", "train/expert_load"))


def mixture(**fields: object) -> nn.Module:
    return build_model(ModelConfig.from_dict({**LLAMA, "n_experts": 4, "expert_size": 32, **fields}))


def test_what_cannot_be_divided_is_named() -> None:
    eight = {"data": 8, "replicate": 1, "size": 4}
    check_experts(mixture(), **eight)
    check_experts(lora(mixture(), target_modules=["experts.up_proj"]), **eight)
    check_experts(mixture(), data=8, replicate=8, size=2)
    wrong = {
        "the model has no experts": (build_model(ModelConfig.from_dict(LLAMA)), eight),
        r"model.n_experts \(4\)": (mixture(), {**eight, "size": 8}),
        r"must divide strategy.data_parallel_size \(6\)": (mixture(), {**eight, "data": 6}),
        "without DoRA": (lora(mixture(), target_modules=["experts.up_proj"], dora=True), eight),
        "model.expert_size, model.n_embd or peft.rank": (mixture(expert_size=33), {**eight, "data": 28}),
    }
    for said, (model, sizes) in wrong.items():
        with pytest.raises(ConfigError, match=said):
            check_experts(model, **sizes)


@pytest.fixture
def four_ranks() -> Iterator[None]:
    """A process group of four of which this process is the first, and the others do nothing."""
    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_process_holds_and_gathers_what_is_planned(size: int, four_ranks: None) -> None:
    model = mixture(n_experts=8, tie_embeddings=True)
    n, block, routed = n_parameters(model), n_parameters(model.blocks[0]), 8 * 3 * 64 * 32
    sizes = {"largest": largest_part(model, experts=size), "experts": expert_parameters(model)}
    share, layout = Share(weights=n, trained=n, **sizes), Layout(data=4, experts=size, zero=3)
    planned = memory(share, layout, activations=0, loss=0)
    # the weights of this rank, and those of a block while it computes
    strategy = ShardedStrategy(expert_parallel_size=size)
    strategy._expert_mesh = expert_mesh("cpu", data=4, replicate=1, size=size)
    strategy._shard(model, init_device_mesh("cpu", (4,)))
    held = sum(local_shard(parameter).numel() for parameter in model.parameters())
    assert planned.weights == pytest.approx(4 * held, rel=0.01)
    first = model.blocks[0]
    for part in (first, *([first.mlp.experts] if size > 1 else [])):
        part.unshard()
    gathered = sum(local_shard(parameter).numel() for parameter in first.parameters())
    assert gathered == block - routed + routed // size
    assert planned.gathered == 3 * 4 * gathered


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("strategy=tensor_parallel", "strategy.expert_parallel_size=2"), "tensor_parallel_size must be 1"),
        (("trainer=fsdp", "strategy.expert_parallel_size=2", "model=gpt_nano"), "the model has no experts"),
    ],
)
def test_a_mistake_is_one_line(options: tuple[str, ...], said: str, folder: Path) -> None:
    command = start(folder, *SMALL, *MIXTURE[:4], *options, "trainer.devices=2")
    out, _ = command.communicate(timeout=300)
    assert command.returncode in (1, 2)
    assert said in out.splitlines()[-1]
