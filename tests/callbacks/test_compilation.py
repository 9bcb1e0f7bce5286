"""Compiled blocks of a run on GPUs: rank 0 times a block, all follow, checkpoints keep the choice."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from genai_pl import callbacks as cb
from genai_pl.callbacks import CompileProbe
from genai_pl.checkpoints.file import MARK, read_contents
from genai_pl.config.enums import Shape
from genai_pl.errors import ConfigError
from genai_pl.models.compile_choice import BlockCall, CompileChoice, Length, Timing
from genai_pl.strategies import ShardedStrategy
from genai_pl.training.compilation import check_compile, compile_probe
from genai_pl.training.precision import Precision

FAST = Timing(plain=2.0, compiled=1.0, seconds=1.0)
SMALL = (
    *("model.n_layer=2", "model.n_embd=32", "model.n_head=2", "model.max_seq_len=32", "tokenizer=byte"),
    *("precision=fp32", "data.batch_size=2", "data.path=text.txt", "trainer.limit_val_batches=0", "logger=csv"),
    *("callbacks.samples.every_n_steps=null", "callbacks.export=false", "trainer.accelerator=cpu"),
)


def probe_of(choice: bool | str, strategy: object = "auto", **module: object) -> CompileProbe | None:
    """The callback of a run with compile=choice, which has callbacks, data and a model that say little."""
    parts = {"automatic_optimization": True, "model": SimpleNamespace(config=SimpleNamespace(shape=Shape.decoder))}
    callbacks = {"console": cb.Console(), "checkpoints": SimpleNamespace(contents={})}
    given = (Precision("32-true", "highest"), SimpleNamespace(**{**parts, **module}), None, callbacks)
    return compile_probe(SimpleNamespace(compile=choice), strategy, *given, stored=None)


@pytest.fixture
def timings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[BlockCall]:
    """The blocks that are timed from here on, on a GPU that is none, where compiling is fast."""
    found: list[BlockCall] = []

    def timing(call: BlockCall, device: torch.device, dtype: torch.dtype, **_: object) -> Timing:
        found.append(call)
        return FAST

    at = "genai_pl.callbacks.compilation"
    monkeypatch.setattr(f"{at}.cached_timing", timing)
    monkeypatch.setattr(f"{at}.machine_of", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    return found


class Blocks(nn.Module):
    """A model that counts how often its block is compiled."""

    def __init__(self) -> None:
        super().__init__()
        self.compiled = 0
        self.blocks = [SimpleNamespace(compile=self.count)]

    def count(self) -> None:
        self.compiled += 1


def start(
    rank: int, sent: list, *, stored: object = None, steps: int = 10**6, device: str = "cuda", call: object = None
) -> tuple[int, list, list]:
    """Start a run on one of two ranks: how often a block is compiled, what is kept and printed. sent: broadcasts of rank 0."""

    def broadcast(value: object) -> object:
        if rank == 0:
            sent.append(value)
        return sent[-1]

    kept, said, model = [], [], Blocks()
    options = {"stored": stored, "keep": kept.append, "say": said.append}
    call = call or (lambda: BlockCall(nn.Identity(), (), {}, 1))
    callback = CompileProbe(call, torch.float32, lambda trainer, kinds: Length(steps, 1, kinds), **options)
    strategy = SimpleNamespace(root_device=torch.device(device, rank), broadcast=broadcast)
    plugin = SimpleNamespace(forward_context=None)
    trainer = SimpleNamespace(strategy=strategy, is_global_zero=rank == 0, precision_plugin=plugin)
    callback.setup(trainer, SimpleNamespace(model=model), "fit")
    return model.compiled, kept, said


@pytest.mark.parametrize(("steps", "on"), [(5000, True), (500, False)])
def test_rank_0_times_a_block_and_the_others_take_its_choice(timings: list, steps: int, on: bool):
    sent: list[CompileChoice] = []
    compiled, kept, (line,) = start(0, sent, steps=steps)
    assert (compiled, kept) == (int(on), [on])
    assert line.startswith(f"compile     {'on' if on else 'off'}: one block 1 ms against 2, 1 s of compilation ")
    assert start(1, sent, steps=steps) == (int(on), [on], [])
    assert len(timings) == 1


@pytest.mark.parametrize("stored", [True, False])
def test_a_resumed_run_keeps_its_choice_and_times_nothing(timings: list, stored: bool):
    word = "on" if stored else "off"
    assert start(0, [], stored=stored) == (int(stored), [stored], [f"compile     {word}: as the run began"])
    assert timings == []


def test_a_checkpoint_is_believed_only_where_it_holds_a_choice(timings: list):
    for stored in ("on", 1, [True], None):
        assert start(0, [], stored=stored)[0] == 1
    assert len(timings) == 4


def test_a_model_without_a_block_that_can_be_timed_is_a_line(timings: list):
    def call() -> BlockCall:
        raise TypeError("features() missing an argument\nand more")

    line = "compile     off: no block can be timed alone (TypeError: features() missing an argument)"
    assert start(0, [], call=call) == (0, [False], [line])


def test_a_cpu_compiles_nothing_and_says_nothing(timings: list):
    assert start(0, [], device="cpu") == start(0, [], device="cpu", stored=True) == (0, [], [])
    assert timings == []


def test_only_auto_probes_and_only_blocks_that_one_process_computes_from_a_batch():
    assert isinstance(probe_of("auto"), CompileProbe)
    assert isinstance(probe_of("auto", ShardedStrategy()), CompileProbe)
    two_stacks = SimpleNamespace(config=SimpleNamespace(shape=Shape.encoder_decoder))
    for options in (
        {"choice": True},
        {"choice": False},
        {"choice": "auto", "strategy": ShardedStrategy(tensor_parallel_size=2)},
        {"choice": "auto", "strategy": ShardedStrategy(context_parallel_size=2)},
        {"choice": "auto", "automatic_optimization": False},
        {"choice": "auto", "model": two_stacks},
    ):
        assert probe_of(**options) is None


def test_checkpoints_keep_the_choice_and_a_resume_follows_it(
    command, timings: list, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """A run on a device that is called cuda where the probe asks for it; `nn.Module.compile` only counts."""
    (tmp_path / "text.txt").write_text(" ".join(f"word{i} is {i * i}." for i in range(60)))
    compiled: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda block: compiled.append(block))
    # the probe is told of a GPU
    original = CompileProbe.setup

    def setup(self: CompileProbe, trainer: object, module: object, stage: str) -> None:
        strategy = SimpleNamespace(root_device=torch.device("cuda"), broadcast=lambda value: value)
        given = {"limit_val_batches": trainer.limit_val_batches, "precision_plugin": trainer.precision_plugin}
        given["accumulate_grad_batches"] = trainer.accumulate_grad_batches
        original(self, SimpleNamespace(strategy=strategy, is_global_zero=True, **given), module, stage)

    monkeypatch.setattr(CompileProbe, "setup", setup)
    monkeypatch.setattr("genai_pl.callbacks.compilation.cached_timing", lambda call, *_, **__: (
        timings.append(call) or Timing(2000.0, 1000.0, 1.0)
    ))  # fmt: skip
    first = command("train", *SMALL, "output_dir=run", "trainer.max_steps=2")
    assert first.status == 0, first.err
    # 1 s / (2 blocks x 1 s) of a step
    assert "compile     on: one block 1e+03 ms against 2e+03, 1 s of compilation pay after 1 of 2 steps" in first.out
    assert (len(compiled), timings[0].args[0].shape) == (2, (2, 32, 32))
    assert read_contents(Path("run/checkpoints/last.ckpt"))[MARK]["compile"] is True
    again = command("train", "resume=run", "trainer.max_steps=3")
    assert again.status == 0, again.err
    assert "compile     on: as the run began" in again.out
    assert (len(compiled), len(timings)) == (4, 1)


def test_another_value_is_refused():
    for value in ("auto", True, False):
        check_compile(SimpleNamespace(compile=value))
    for value in ("perhaps", 1):
        with pytest.raises(ConfigError, match=f"compile={value}: auto, true or false"):
            check_compile(SimpleNamespace(compile=value))
