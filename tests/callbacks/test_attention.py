"""The attention of a run on GPUs: rank 0 probes, all follow, checkpoints keep it."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from genai_pl.callbacks import AttentionProbe
from genai_pl.checkpoints.file import MARK, read_contents
from genai_pl.config.model import ModelConfig
from genai_pl.kernels import attention_probe
from genai_pl.kernels.attention_probe import Choice, ProbeShape
from genai_pl.kernels.preference import UNPROBED, prefer, preferred
from genai_pl.models import attention_choice
from genai_pl.models.attention_choice import probe_shape
from genai_pl.models.build import build_model

SHAPE = ProbeShape(n_head=2, n_kv_head=1, head_dim=16, dtype=torch.bfloat16, length=64)
CHOICE = Choice(("sdpa", "varlen"), "the fastest here", {"triton": "it is wrong on this GPU"})
SMALL = (
    *(
        "model.n_layer=1",
        "model.n_embd=32",
        "model.n_head=2",
        "model.max_seq_len=32",
        "tokenizer=byte",
        "precision=fp32",
    ),
    *("data.batch_size=2", "data.path=text.txt", "trainer.limit_val_batches=0", "callbacks.samples.every_n_steps=null"),
    *("callbacks.export=false", "logger=csv", "trainer.accelerator=cpu"),
)


@pytest.fixture(autouse=True)
def unprobed():
    yield
    prefer(UNPROBED)


@pytest.fixture
def probed(monkeypatch) -> list[tuple]:
    """What the probe is called with, from here on; it finds CHOICE."""
    calls: list[tuple] = []

    def probe(shape: ProbeShape | None, device: torch.device, *, keep: tuple[str, ...] | None) -> Choice:
        calls.append((shape, keep))
        return CHOICE

    monkeypatch.setattr("genai_pl.callbacks.attention.prefer_fastest", probe)
    return calls


def start(rank: int, sent: list, *, stored: object = None) -> tuple[list, list]:
    """Start a run on one of two ranks; what it keeps and what it prints. sent: what rank 0 has broadcast."""

    def broadcast(value: object) -> object:
        if rank == 0:
            sent.append(value)
        return sent[-1]

    kept, said = [], []
    callback = AttentionProbe(lambda: SHAPE, stored=stored, keep=kept.append, say=said.append)
    strategy = SimpleNamespace(root_device=torch.device("cuda", rank), broadcast=broadcast)
    callback.setup(SimpleNamespace(strategy=strategy, is_global_zero=rank == 0), None, "fit")
    return kept, said


def test_rank_0_probes_and_the_others_take_its_choice(probed: list):
    sent: list = []
    assert start(0, sent) == (
        [("sdpa", "varlen")],
        ["attention   sdpa: the fastest here", "attention   triton is left out: it is wrong on this GPU"],
    )
    prefer(UNPROBED)
    assert start(1, sent) == ([("sdpa", "varlen")], [])
    assert preferred().backends == ("sdpa", "varlen", "reference")
    assert probed == [(SHAPE, None)]


@pytest.mark.parametrize(
    ("stored", "keep"),
    [
        *((stored, None) for stored in (["flash"], "sdpa", 3, [3], {"sdpa": 1})),
        (["varlen", "sdpa"], ("varlen", "sdpa")),
        ([], ()),
    ],
)
def test_a_resumed_run_keeps_its_order_and_nothing_else_is_believed(probed: list, stored: object, keep: tuple | None):
    start(0, [], stored=stored)
    assert probed == [(SHAPE, keep)]


def test_checkpoints_keep_the_order_and_a_resume_hands_it_to_the_probe(command, probed: list, tmp_path: Path):
    (tmp_path / "text.txt").write_text(" ".join(f"word{i} is {i * i}." for i in range(60)))
    first = command("train", *SMALL, "output_dir=run", "trainer.max_steps=1")
    assert first.status == 0, first.err
    assert "attention   sdpa: the fastest here\nattention   triton is left out" in first.out
    assert read_contents(Path("run/checkpoints/last.ckpt"))[MARK]["attention"] == ["sdpa", "varlen"]
    again = command("train", "resume=run", "trainer.max_steps=2")
    assert again.status == 0, again.err
    assert [keep for _, keep in probed] == [None, ("sdpa", "varlen")]
    assert probed[0][0] == SHAPE._replace(dtype=torch.float32, n_kv_head=2, length=32)


def test_a_cpu_has_nothing_to_choose():
    kept, said = [], []
    strategy = SimpleNamespace(root_device=torch.device("cpu"), broadcast=lambda value: value)
    callback = AttentionProbe(lambda: SHAPE, stored=None, keep=kept.append, say=said.append)
    callback.setup(SimpleNamespace(strategy=strategy, is_global_zero=True), None, "fit")
    assert (kept, said, preferred()) == ([], [], UNPROBED)


def test_the_shape_is_that_of_the_model_and_a_named_backend_has_none():
    sizes = {"n_layer": 1, "n_head": 4, "n_embd": 64, "vocab_size": 9, "max_seq_len": 16384, "position": "alibi"}
    model = build_model(ModelConfig(**sizes, n_kv_head=2, dropout=0.1, window=8))
    expected = ProbeShape(4, 2, 16, torch.float16, 8192, window=8, alibi=True, dropout=0.1, compiled=True)
    assert probe_shape(model, torch.float16, length=16384, backward=True, compiled=True) == expected
    model = build_model(ModelConfig(**sizes, attention="sdpa"))
    assert probe_shape(model, torch.float16, length=64, backward=True) is None


def test_a_gpu_is_probed_once_and_followed_from_then_on(monkeypatch, tmp_path: Path):
    """`prefer_fastest` on a device that is called cuda: the kernels' own functions are replaced, what joins them is not."""
    attends: dict[str, Callable] = {"sdpa": attention_probe.candidates_for(SHAPE, torch.device("cpu"))["sdpa"]}
    monkeypatch.setattr(attention_choice, "candidates_for", lambda shape, device: attends)
    monkeypatch.setattr(attention_choice, "gpu_clock", lambda step: step() or 1.0)
    monkeypatch.setattr(attention_choice, "machine_of", lambda device: "a GPU")
    monkeypatch.setattr(attention_choice, "table_file", lambda: tmp_path / "attention.json")
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    device = SimpleNamespace(type="cuda")
    for name in ("cached_choice", "choose"):
        original = getattr(attention_choice, name)
        on_cpu = lambda shape, _, original=original, **given: original(shape, torch.device("cpu"), **given)  # noqa: E731
        monkeypatch.setattr(attention_choice, name, on_cpu)
    choice = attention_choice.prefer_fastest(SHAPE, device)
    assert choice.backends == ("sdpa",)
    assert preferred().backends == ("sdpa", "reference")
    assert "as measured before" in attention_choice.prefer_fastest(SHAPE, device).reason
    assert attention_choice.prefer_fastest(SHAPE, device, keep=("sdpa",)).reason == "as the run began"
