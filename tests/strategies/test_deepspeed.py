"""DeepSpeed's ZeRO on two CPU processes, compared with DDP: steps, checkpoints, exports; skipped where it is not installed."""

import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.strategies.processes import (
    HALF,
    MODEL,
    SMALL,
    assert_equal_to_the_last_bit,
    assert_same,
    start,
    train,
    write_documents,
)

INSTALLED = find_spec("deepspeed") is not None
needs_deepspeed = pytest.mark.skipif(not INSTALLED, reason="pip install deepspeed ninja")
OPTIONS = (
    *(*SMALL, HALF, "trainer.devices=2", "trainer.accelerator=cpu", "optimizer=adamw", "optimizer.lr=0.003"),
    "model.dropout=0.1",
    *("trainer.accumulate_grad_batches=2", "trainer.gradient_clip_val=0.5", "callbacks.checkpoint.every_n_steps=2"),
)


@pytest.fixture(scope="module")
def ddp(folder: Path) -> Path:
    """A run of DDP, whose gradients are clipped and accumulated."""
    train(folder, *OPTIONS, "strategy=ddp", "output_dir=ddp")
    return folder / "ddp"


def half(run: Path, name: str) -> Path:
    """A copy of a run of four steps as it was after two."""
    copied = shutil.copytree(run, run.with_name(name), symlinks=True)
    for path in ("checkpoints/step=000004.ckpt", "checkpoints/last.ckpt"):
        (copied / path).unlink()
    shutil.rmtree(copied / "model")
    return copied


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_run_is_that_of_ddp_and_goes_on_with_either(stage: int, ddp: Path) -> None:
    folder, zero = ddp.parent, ("strategy=deepspeed", f"strategy.stage={stage}")
    train(folder, *OPTIONS, *zero, f"output_dir=zero{stage}")
    run = folder / f"zero{stage}"
    assert_same(run, ddp, names=("train/loss", "train/grad_norm", "val/loss"))
    # resumed
    again = half(run, f"zero{stage}-again")
    assert "step 2; weights, optimizer, schedule" in train(folder, f"resume={again.name}")
    assert_equal_to_the_last_bit(again, run, MODEL)
    # from DDP and to DDP
    for before, after in ((ddp, zero), (run, ("strategy=ddp",))):
        crossed = half(before, f"{before.name}-then-{after[0]}-{stage}")
        train(folder, f"resume={crossed}", *after)
        assert_same(crossed, ddp, names=("train/loss", "train/grad_norm", "val/loss"))


@needs_deepspeed
@pytest.mark.slow
def test_a_resumed_run_of_bf16_keeps_the_bits_of_its_weights(ddp: Path) -> None:
    train(ddp.parent, *OPTIONS, "strategy=deepspeed", "precision=bf16", "output_dir=bf16")
    again = half(ddp.parent / "bf16", "bf16-again")
    train(ddp.parent, f"resume={again.name}")
    assert_equal_to_the_last_bit(again, ddp.parent / "bf16", MODEL)


@needs_deepspeed
@pytest.mark.slow
def test_frozen_weights_and_samples(ddp: Path) -> None:
    lora = (
        *OPTIONS[len(SMALL) :],
        "data.path=documents.jsonl",
        "init_from=ddp/model",
        "peft=lora",
        "trainer.max_steps=2",
    )
    lora = (*lora, "trainer.limit_val_batches=2", "trainer.log_every_n_steps=1", "logger=csv", "objective=clm")
    out = {}
    for name, options in {"lora-ddp": (), "lora-2": ("strategy.stage=2",), "lora-3": ("strategy.stage=3",)}.items():
        strategy = "strategy=deepspeed" if options else "strategy=ddp"
        samples = ("callbacks.samples.every_n_steps=1", "callbacks.samples.max_new_tokens=4")
        out[name] = train(ddp.parent, *lora, *samples, strategy, *options, f"output_dir={name}")
    for name in ("lora-2", "lora-3"):
        run, expected = ddp.parent / name, ddp.parent / "lora-ddp"
        assert_same(
            run, expected, names=("train/loss", "train/grad_norm"), exported="adapter/adapter_model.safetensors"
        )
    assert (ddp.parent / "lora-2" / "samples.jsonl").exists()
    assert "samples     none: no process holds the whole model" in out["lora-3"]


MISTAKES = {
    "strategy=deepspeed optimizer=muon": "MuonAdamW needs whole matrices or moments of its own; optimizer=adamw",
    "strategy=deepspeed optimizer=adamw strategy.stage=4": "strategy.stage=4: ZeRO has stages 1, 2 and 3",
    "strategy=deepspeed optimizer=adamw trainer.devices=1 trainer.optimizer_in_backward=true trainer.gradient_clip_val=null "
    "trainer.accumulate_grad_batches=1": "trainer.optimizer_in_backward=true is for one process",
    "strategy=deepspeed optimizer=adamw callbacks=ema": "callbacks=ema needs the whole model in each process",
}


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(mistake: str, folder: Path) -> None:
    run = start(folder, *OPTIONS, *mistake.split())
    out, _ = run.communicate(timeout=300)
    assert run.returncode != 0
    assert f"error: {MISTAKES[mistake]}" in out or f"error: strategy=deepspeed: {MISTAKES[mistake]}" in out
    assert "Traceback" not in out


@pytest.mark.skipif(INSTALLED, reason="DeepSpeed is installed")
def test_without_the_package_it_is_refused_in_one_line(command, tmp_path: Path) -> None:
    write_documents(tmp_path)
    result = command("train", *SMALL, "strategy=deepspeed")
    assert result.status in (1, 2)
    assert result.err.count("\n") == 1
    assert "strategy=deepspeed: the package is not installed; pip install deepspeed" in result.err
