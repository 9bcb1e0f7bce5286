"""precision=auto: what it becomes on which machine, and that a run keeps it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from genai_pl.training import precision
from genai_pl.training.precision import choose_precision

AUTO = OmegaConf.create({"lightning": "auto", "matmul": "auto"})
SMALL = (
    *("model.n_layer=1", "model.n_embd=128", "model.n_head=2", "model.max_seq_len=32", "tokenizer=byte"),
    *("data.batch_size=2", "data.path=text.txt", "trainer.limit_val_batches=1", "callbacks.samples.every_n_steps=null"),
    *("callbacks.export=false", "logger=csv", "trainer.accelerator=cpu"),
)


@pytest.fixture
def pays(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """`pays(False)`: from here on this machine multiplies bfloat16 no faster than float32."""
    for name in precision.SIZES:
        monkeypatch.delenv(name, raising=False)
    return lambda value: monkeypatch.setattr(precision, "bf16_products_pay", lambda: value)


@pytest.mark.parametrize(
    ("fast", "n_embd", "variables", "stored", "expected"),
    [
        (True, 128, {}, None, ("bf16-mixed", "high")),
        (False, 128, {}, None, ("32-true", "highest")),
        (True, 127, {}, None, ("32-true", "highest")),
        (True, 128, {"WORLD_SIZE": "2"}, None, ("32-true", "highest")),
        (True, 128, {"SLURM_STEP_NUM_TASKS": "2"}, None, ("32-true", "highest")),
        (True, 128, {"SLURM_NTASKS": "2"}, None, ("bf16-mixed", "high")),
        (True, 128, {}, "32-true", ("32-true", "highest")),
        (False, 16, {}, "bf16-mixed", ("bf16-mixed", "high")),
    ],
)
def test_auto_is_what_pays_or_what_the_run_began_with(pays, monkeypatch, fast, n_embd, variables, stored, expected):
    pays(fast)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    chosen = choose_precision(AUTO, n_embd=n_embd, device="cpu", stored=stored)
    assert chosen[:2] == expected
    assert chosen.reason


def test_a_named_precision_is_taken_as_it_is(pays):
    pays(True)
    options = OmegaConf.create({"lightning": "32-true", "matmul": "highest"})
    assert choose_precision(options, n_embd=512, device="cpu", stored="bf16-mixed") == ("32-true", "highest", "")


@pytest.mark.parametrize("began", ["bf16-mixed", "32-true"])
def test_a_resumed_run_keeps_its_precision_on_another_machine(command, pays, tmp_path: Path, began: str) -> None:
    (tmp_path / "text.txt").write_text(" ".join(f"word{i} is {i * i}." for i in range(60)))
    fast = began == "bf16-mixed"
    # a run of four steps, and one of two that goes on where the probe says the contrary
    for name, steps in (("whole", 4), ("parts", 2)):
        pays(fast)
        result = command("train", *SMALL, f"output_dir={name}", f"trainer.max_steps={steps}", "scheduler=constant")
        assert result.status == 0, result.err
        assert f"precision {began} (auto: " in result.out
    contents = torch.load("parts/checkpoints/last.ckpt", weights_only=True)
    assert contents["genai_pl"]["precision"] == began
    pays(not fast)
    result = command("train", "resume=parts", "trainer.max_steps=4")
    assert result.status == 0, result.err
    assert f"precision {began} (auto: as it began)" in result.out
    # products may differ by what the machine is fast in, which both runs read from the real probe here
    states = [torch.load(f"{run}/checkpoints/last.ckpt", weights_only=True)["state_dict"] for run in ("whole", "parts")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_commands_that_report_numbers_refuse_auto_in_one_line(command, tmp_path: Path) -> None:
    result = command("evaluate", "checkpoint=nowhere", "precision=auto")
    assert result.status != 0
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1
