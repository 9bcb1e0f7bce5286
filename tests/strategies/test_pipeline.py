"""Pipeline stages together take the steps of one process, and resume where it stopped."""

import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from genai_pl.errors import ConfigError
from genai_pl.strategies import PipelineStrategy
from genai_pl.strategies.pipeline_stages import stage_of
from tests.strategies.processes import HALF, SMALL, WHOLE, assert_same, start, table, train
from tests.strategies.test_kills import processes, wait_for_step

TWO = ("strategy=pipeline", "trainer.devices=2", WHOLE)
FOUR = ("strategy=pipeline", "strategy.data_parallel_size=2", "strategy.microbatches=2", "trainer.devices=4", HALF)
GPIPE = (*TWO, "strategy.schedule=gpipe")
INTERLEAVED = (*TWO, "strategy.schedule=interleaved")
ZERO_BUBBLE = (*TWO, "strategy.schedule=zero_bubble")
ADAMW = ("optimizer=adamw", "optimizer.lr=1e-3")
OBJECTIVES = {
    # tied embeddings, rows of unequal numbers of targets, four batches to a step, a gradient far too long
    "clm": ("trainer.accumulate_grad_batches=4", "trainer.gradient_clip_val=0.05"),
    # a table that all stages look up, a head of its own
    "prefix_lm": ("objective=prefix_lm", "model.position=relative", "model.tie_embeddings=false"),
    "prefix_lm deep": (
        "objective=prefix_lm",
        "model.position=relative",
        "model.tie_embeddings=false",
        "model.n_layer=4",
    ),
    "mlm": ("model=encoder_nano", "objective=mlm"),
    "fim": ("objective=fim",),
    "five blocks": ("model.n_layer=5", "trainer.accumulate_grad_batches=2"),
    "muon": ("optimizer=muon", "optimizer.lr=1e-3"),
    "adafactor": ("optimizer=adafactor", "trainer.recompute_every=1"),
}
SLOW = [
    ("five blocks", INTERLEAVED),
    ("five blocks", ZERO_BUBBLE),
    ("prefix_lm deep", INTERLEAVED),
    ("prefix_lm", GPIPE),
    ("clm", GPIPE),
    ("clm", FOUR),
    ("mlm", TWO),
    ("fim", GPIPE),
    ("muon", TWO),
    ("adafactor", TWO),
]


@pytest.mark.parametrize(
    ("objective", "options"),
    [("clm", TWO), *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)],
)
def test_a_pipeline_gives_the_losses_and_weights_of_one_process(
    objective: str, options: tuple[str, ...], folder: Path, reference, request: pytest.FixtureRequest
) -> None:
    run = folder / request.node.callspec.id
    train(folder, *SMALL, *OBJECTIVES[objective], *options, f"hydra.run.dir='{run}'")
    assert_same(run, reference(objective))


@pytest.mark.slow
def test_an_adapter_learns_the_same_in_a_pipeline(folder: Path) -> None:
    options = (*SMALL, *ADAMW, "peft=lora", "trainer.gradient_clip_val=0.05")
    one, two = folder / "lora-one", folder / "lora-two"
    train(folder, *options, WHOLE, f"hydra.run.dir={one}")
    train(folder, *options, *TWO, f"hydra.run.dir={two}")
    weights, others = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (two, one))
    assert weights.keys() == others.keys()
    for name, value in others.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(TWO, (WHOLE,)), ((WHOLE,), TWO)], ids=["two_to_one", "one_to_two"])
def test_a_run_goes_on_with_another_number_of_processes(
    before: tuple[str, ...], after: tuple[str, ...], folder: Path, request: pytest.FixtureRequest
) -> None:
    options = (*SMALL, *ADAMW)
    whole = folder / "whole"
    if not whole.exists():
        train(folder, *options, WHOLE, f"hydra.run.dir={whole}")
    run = folder / request.node.callspec.id
    train(folder, *options, *before, "trainer.max_steps=2", f"hydra.run.dir={run}")
    back = () if after == TWO else ("strategy=auto", "trainer.devices=1")
    train(folder, f"resume={run}", "trainer.max_steps=4", *after, *back)
    actual, expected = table(run), table(whole)
    for step in (3, 4):
        assert float(actual[step]["train/loss"]) == pytest.approx(float(expected[step]["train/loss"]), rel=1e-5)
    weights, others = (load_file(path / "model" / "model.safetensors") for path in (run, whole))
    for name, value in others.items():
        # where a gradient is rounding, AdamW moves a weight by up to a step of 1e-3
        assert (weights[name] - value).abs().max() <= 1e-4, name


@pytest.mark.slow
def test_a_stage_that_is_killed_ends_the_others(folder: Path) -> None:
    run = folder / "killed"
    process = start(folder, *SMALL, *TWO, "trainer.max_steps=1000", f"hydra.run.dir={run}")
    wait_for_step(process, run, 2)
    os.kill(processes(process)[1], signal.SIGKILL)
    out, _ = process.communicate(timeout=30)
    assert process.returncode != 0
    assert "error: process 1 of the run was killed by signal 9; all end here" in out


@pytest.mark.parametrize(("n_blocks", "n_stages"), [(2, 2), (3, 2), (7, 3), (12, 5), (4, 4)])
def test_stages_are_neighbours_and_differ_by_one_block_at_most(n_blocks: int, n_stages: int) -> None:
    stages = [stage_of(block, n_blocks, n_stages) for block in range(n_blocks)]
    assert stages == sorted(stages)
    sizes = [stages.count(stage) for stage in range(n_stages)]
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) > 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"schedule": "zigzag"}, "strategy.schedule"),
        ({"microbatches": 0}, "strategy.microbatches"),
        ({"stages_per_rank": 2}, "stages_per_rank=2: 1 under strategy.schedule=1f1b"),
        ({"schedule": "interleaved", "stages_per_rank": 1}, "stages_per_rank=1: 2 or more under"),
    ],
)
def test_an_option_that_cannot_be_is_named(options: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        PipelineStrategy(**options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("strategy.microbatches=3",), "data.batch_size"),
        (("model.n_layer=1",), "model.n_layer"),
        (("strategy.schedule=zero_bubble", "model.n_layer=4", "compile=true"), "compile does not go with"),
        (("strategy.schedule=interleaved", "model.n_layer=3"), "for each of 4 stages"),
        (("peft=prompt",), "virtual tokens"),
        (("model=t5_nano", "objective=span_corruption"), "decoders and encoders"),
    ],
)
def test_what_no_pipeline_can_do_is_told_in_one_line(options: tuple[str, ...], said: str, folder: Path) -> None:
    process = start(folder, *SMALL, *TWO, *options, f"hydra.run.dir={folder / 'refused'}")
    out, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert said in out
    assert "Traceback" not in out
