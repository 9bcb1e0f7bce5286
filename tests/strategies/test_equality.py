"""Two processes take the steps of one on the same batches, under every strategy."""

from pathlib import Path

import pytest

from tests.strategies.processes import HALF, SAME, SMALL, WHOLE, assert_same, start, train

OBJECTIVES = {
    # tied embeddings, norms of single heads, rows of many documents, four batches to a step, a gradient far too long
    "clm": ("trainer.accumulate_grad_batches=4", "trainer.gradient_clip_val=0.05"),
    "mlm": ("model=encoder_nano", "objective=mlm"),
    # a head of its own
    "llama": ("model=llama", "model.n_head=4", "model.n_kv_head=2", "model.intermediate_size=64"),
    "relative": ("model=t5_nano", "objective=span_corruption", "model.n_head=4"),
    "alibi": ("model.position=alibi", "model.qk_norm=false", "optimizer=muon", "optimizer.lr=1e-3"),
}
MIXTURE = (
    # auxiliary losses are defined on micro-batches, which two processes halve; loads and biases are of the whole step
    "model=moe_nano", "model.balance_loss=0", "model.balance_bias=0.01", "model.n_experts=5", "model.expert_size=16",
    "model.n_shared_experts=1",
)  # fmt: skip
OBJECTIVES |= {"experts": MIXTURE, "experts_muon": (*MIXTURE, "optimizer=muon", "optimizer.lr=1e-3")}
QLORA = ("model.n_embd=64", "peft=lora", "peft.quantize=nf4")
OBJECTIVES |= {"qlora": QLORA, "qlora_int8": (*QLORA, "peft.quantize=int8"), "qlora_dora": (*QLORA, "peft=dora")}
STRATEGIES = {
    "ddp": ("trainer=ddp", HALF),
    "fsdp": ("trainer=fsdp", HALF),
    "tensor_parallel": ("strategy=tensor_parallel", WHOLE),
    "shards of sequences": ("strategy=tensor_parallel", "strategy.sequence_parallel=true", WHOLE),
}
QUICK = [("clm", "ddp"), ("clm", "tensor_parallel")]  # the rest is slow: each run starts two processes


@pytest.mark.parametrize(
    ("objective", "strategy"),
    [
        pytest.param(objective, strategy, marks=() if (objective, strategy) in QUICK else pytest.mark.slow)
        for objective in ("clm", "mlm", "llama")
        for strategy in STRATEGIES
    ],
)
def test_two_processes_give_the_losses_and_weights_of_one(
    objective: str, strategy: str, folder: Path, reference
) -> None:
    expected, run = reference(objective), folder / f"{objective}-{strategy}"
    options = (*OBJECTIVES[objective], *STRATEGIES[strategy], "trainer.devices=2", f"hydra.run.dir='{run}'")
    train(folder, *SMALL, *options)
    assert_same(run, expected)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["tensor_parallel", "shards of sequences"])
@pytest.mark.parametrize("objective", ["relative", "alibi"])
def test_heads_take_their_own_positions_along(objective: str, strategy: str, folder: Path, reference) -> None:
    expected, run = reference(objective), folder / f"{objective}-{strategy}"
    options = (*OBJECTIVES[objective], *STRATEGIES[strategy], "trainer.devices=2", f"hydra.run.dir='{run}'")
    train(folder, *SMALL, *options)
    assert_same(run, expected)


@pytest.mark.slow
@pytest.mark.parametrize(("objective", "strategy"), [("experts", "ddp"), ("experts", "fsdp"), ("experts_muon", "fsdp")])
def test_experts_and_their_loads_are_those_of_one_process(
    objective: str, strategy: str, folder: Path, reference
) -> None:
    expected, run = reference(objective), folder / f"{objective}-{strategy}"
    options = (*OBJECTIVES[objective], *STRATEGIES[strategy], "trainer.devices=2", f"hydra.run.dir='{run}'")
    train(folder, *SMALL, *options)
    assert_same(run, expected, names=(*SAME, "train/expert_load", "train/expert_load/layer_1"))


QLORA_RUNS = {
    "file": ("qlora",),
    "shards": ("qlora", "strategy.sharded_checkpoints=true"),
    "int8": ("qlora_int8",),
    "offloaded": ("qlora", "strategy.cpu_offload=true"),
    "gathered once": ("qlora", "strategy.reshard_after_forward=false"),
    "twice": ("qlora", "trainer.recompute=full"),
    "dora": ("qlora_dora",),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", QLORA_RUNS)
def test_a_quantized_base_is_sharded_over_the_ranks_of_fsdp(name: str, folder: Path, reference) -> None:
    objective, *options = QLORA_RUNS[name]
    expected, run = reference(objective), folder / f"qlora-fsdp-{list(QLORA_RUNS).index(name)}"
    given = (*OBJECTIVES[objective], *STRATEGIES["fsdp"], *options, "trainer.devices=2", f"hydra.run.dir={run}")
    train(folder, *SMALL, *given, "trainer.max_steps=2")
    train(folder, f"resume={run.name}", "trainer.max_steps=4")
    names = ("train/loss", "train/grad_norm")
    assert_same(run, expected, names=names, exported="adapter/adapter_model.safetensors")


@pytest.mark.slow
def test_a_quantized_base_is_not_divided_by_layers(folder: Path) -> None:
    command = start(folder, *SMALL, *QLORA, "strategy=tensor_parallel", WHOLE, "trainer.devices=2")
    out, _ = command.communicate(timeout=300)
    assert command.returncode in (1, 2)
    assert "peft.quantize: a quantized base cannot be divided by layer" in out.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["tensor_parallel", "pipeline"])
def test_experts_are_not_divided_by_layers_or_channels(strategy: str, folder: Path) -> None:
    command = start(folder, *SMALL, *MIXTURE, f"strategy={strategy}", WHOLE, "trainer.devices=2")
    out, _ = command.communicate(timeout=300)
    assert command.returncode in (1, 2)
    assert "model.n_experts" in out.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["two_to_one", "one_to_two"])
@pytest.mark.parametrize("saved", [(), ("strategy.sharded_checkpoints=true",)], ids=["file", "shards"])
def test_a_divided_run_goes_on_with_another_number_of_processes(
    saved: tuple[str, ...], direction: str, folder: Path, reference
) -> None:
    one, two = ("strategy=auto", "trainer.devices=1"), (*STRATEGIES["shards of sequences"], "trainer.devices=2")
    before, after = ((*two, *saved), one) if direction == "two_to_one" else (one, (*two, *saved))
    run = folder / f"{direction}{len(saved)}"
    train(folder, *SMALL, *OBJECTIVES["clm"], WHOLE, *before, "trainer.max_steps=2", f"hydra.run.dir={run}")
    train(folder, f"resume={run.name}", *after, "trainer.max_steps=4")
    assert_same(run, reference("clm"), names=("train/loss", "train/grad_norm"))


@pytest.mark.slow
def test_muon_steps_whole_matrices_that_lie_in_pieces(folder: Path, reference) -> None:
    expected, run = reference("alibi"), folder / "alibi-fsdp"
    train(folder, *SMALL, *OBJECTIVES["alibi"], *STRATEGIES["fsdp"], "trainer.devices=2", f"hydra.run.dir={run}")
    assert_same(run, expected)


FOUR = {
    "heads divided, and shards of them": ("strategy=tensor_parallel", "strategy.data_parallel_size=2", HALF),
    "shards of sequences, and shards": (
        "strategy=tensor_parallel",
        "strategy.data_parallel_size=2",
        "strategy.sequence_parallel=true",
        "strategy.sharded_checkpoints=true",
        HALF,
    ),
    "two copies, each in two shards": ("trainer=fsdp", "strategy.replicate_size=2", "data.batch_size=1"),
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", FOUR)
@pytest.mark.parametrize("objective", ["clm", "alibi"])
def test_four_processes_give_the_losses_and_weights_of_one(
    objective: str, layout: str, folder: Path, reference
) -> None:
    expected, run = reference(objective), folder / f"{objective}-{list(FOUR).index(layout)}"
    train(folder, *SMALL, *OBJECTIVES[objective], *FOUR[layout], "trainer.devices=4", f"hydra.run.dir={run}")
    assert_same(run, expected)


@pytest.mark.slow
def test_a_block_that_runs_twice_gives_the_same_losses(folder: Path, reference) -> None:
    run = folder / "clm-recompute"
    options = ("trainer=fsdp", "trainer.devices=1", "trainer.recompute_every=1", WHOLE)
    train(folder, *SMALL, *OBJECTIVES["clm"], *options, f"hydra.run.dir={run}")
    assert_same(run, reference("clm"))
