"""The probe of attention backends, with candidates and a clock of our own."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from genai_pl.kernels import AttentionMask, ScoreOptions, choose_backend
from genai_pl.kernels.attention_probe import Attend, Choice, ProbeShape, cached_choice, candidates_for, choose
from genai_pl.kernels.preference import UNPROBED, prefer, preferred
from genai_pl.kernels.reference import reference_attention
from genai_pl.kernels.sdpa import sdpa_attention

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SHAPE = ProbeShape(n_head=4, n_kv_head=2, head_dim=16, dtype=torch.bfloat16, length=64)


def right(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, options: ScoreOptions) -> Tensor:
    return reference_attention(q, k, v, mask, **options._asdict())


def raises(*_: object) -> Tensor:
    raise RuntimeError("PTX assembly failed\nand more lines")


def blind_to_documents(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, options: ScoreOptions) -> Tensor:
    return right(q, k, v, AttentionMask(causal=mask.causal), options)


def without_gradient_of_keys(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, options: ScoreOptions) -> Tensor:
    return right(q, k.detach() + 0 * k, v, mask, options)


def nan(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, options: ScoreOptions) -> Tensor:
    return right(q, k, v, mask, options) * float("nan")


def clock(times: dict[str, float]) -> Callable[[Callable[[], None]], float]:
    """A clock that runs a step and says how long its candidate takes."""

    def measure(step: Callable[[], None]) -> float:
        step()
        return times[step.args[0].__name__]

    return measure


def named(name: str) -> Attend:
    """The right attention under a name."""

    def attend(*arguments: object) -> Tensor:
        return right(*arguments)

    attend.__name__ = name
    return attend


@pytest.fixture(autouse=True)
def unprobed():
    yield
    prefer(UNPROBED)


def test_the_fastest_right_candidate_is_first_and_the_line_tells_the_times():
    attends = {"triton": named("a"), "sdpa": named("b"), "varlen": named("c")}
    choice = choose(SHAPE, CPU, clock=clock({"a": 2.0, "b": 3.0, "c": 0.5}), attends=attends)
    assert choice.backends == ("varlen", "triton", "sdpa")
    assert choice.left_out == {}
    (line,) = choice.lines()  # two batches are timed
    assert line.startswith(
        "varlen: the fastest here (varlen 1 ms, triton 4 ms, sdpa 6 ms; forward and backward, 4 heads"
    )


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (raises, "RuntimeError: PTX assembly failed"),
        (blind_to_documents, "it is wrong on this GPU (packed rows"),
        (without_gradient_of_keys, "it is wrong on this GPU (plain rows"),
        (nan, "error nan"),
    ],
)
def test_a_candidate_that_fails_or_is_wrong_is_left_out_with_one_line_and_never_used(wrong: Attend, words: str):
    attends = {"triton": wrong, "sdpa": named("b")}
    choice = choose(SHAPE, CPU, clock=clock({"b": 3.0}), attends=attends)
    assert choice.backends == ("sdpa",)
    lines = choice.lines()
    assert len(lines) == 2
    assert lines[1].startswith("triton is left out: ")
    assert words in lines[1]
    assert "\n" not in "".join(lines)
    prefer(choice.preference())
    assert choose_backend(CUDA)[0] == "sdpa"
    assert choose_backend(CUDA, options=ScoreOptions(softcap=3.0))[0] == "reference"  # not triton, which could


def test_a_shape_without_a_backward_pass_accepts_what_has_no_gradient():
    attends = {"triton": without_gradient_of_keys}
    shape = SHAPE._replace(backward=False)
    choice = choose(shape, CPU, clock=clock({"without_gradient_of_keys": 1.0}), attends=attends)
    assert choice.backends == ("triton",)


def test_a_candidate_that_fails_while_it_is_timed_is_left_out():
    def fills_the_memory(step: Callable[[], None]) -> float:
        if step.args[0].__name__ == "a":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 1.0

    choice = choose(SHAPE, CPU, clock=fills_the_memory, attends={"triton": named("a"), "sdpa": named("b")})
    assert choice.backends == ("sdpa",)
    assert choice.left_out == {"triton": "OutOfMemoryError: CUDA out of memory"}


def test_where_nothing_is_right_the_reference_runs():
    choice = choose(SHAPE, CPU, clock=clock({}), attends={"triton": raises})
    assert choice.lines()[0] == "reference: no other backend is right on this GPU"
    prefer(choice.preference())
    assert choose_backend(CUDA) == ("reference", "no other backend is right on this GPU")


def test_a_run_that_goes_on_keeps_its_order_without_the_clock_and_drops_what_fails_here():
    attends = {"triton": named("a"), "sdpa": named("b"), "varlen": raises}

    def never(_: object) -> float:
        raise AssertionError("timed")

    choice = choose(SHAPE, CPU, clock=never, attends=attends, keep=("varlen", "sdpa", "triton"))
    assert choice.backends == ("sdpa", "triton")
    assert choice.lines()[0] == "sdpa: as the run began"
    gone = choose(SHAPE, CPU, clock=never, attends={"sdpa": named("b")}, keep=("triton", "sdpa"))
    assert gone.backends == ("sdpa",)
    assert gone.left_out == {"triton": "it is no candidate here"}


def test_the_state_of_random_numbers_is_that_of_before():
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    shape = SHAPE._replace(dropout=0.5)
    choose(shape, CPU, clock=clock({"a": 1.0}), attends={"sdpa": named("a")})
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    "shape",
    [
        SHAPE._replace(causal=False),
        SHAPE._replace(window=20, sinks=True),
        SHAPE._replace(alibi=True, dtype=torch.float32),
        SHAPE._replace(bias=True, dropout=0.1, dtype=torch.float16),
    ],
    ids=["encoder", "window", "alibi", "bias"],
)
def test_sdpa_is_right_for_every_kind_of_shape(shape: ProbeShape):
    choice = choose(shape, CPU, clock=lambda step: step() or 1.0, attends={"sdpa": sdpa_attention})
    assert choice.left_out == {}


def test_a_choice_is_measured_once_per_machine_and_shape(tmp_path: Path):
    file, runs = tmp_path / "cache" / "attention.json", []

    def counts(step: Callable[[], None]) -> float:
        runs.append(step)
        return 1.0

    attends = {"triton": raises, "sdpa": named("b")}
    given = {"file": file, "clock": counts, "attends": attends}
    first = cached_choice(SHAPE, CPU, machine="H200 torch 2.13", **given)
    again = cached_choice(SHAPE, CPU, machine="H200 torch 2.13", **given)
    assert len(runs) == 2
    assert again == Choice(first.backends, f"{first.reason}, as measured before", first.left_out)
    cached_choice(SHAPE, CPU, machine="H200 torch 2.14", **given)
    cached_choice(SHAPE._replace(head_dim=24), CPU, machine="H200 torch 2.13", **given)
    assert len(runs) == 6
    assert len(json.loads(file.read_text())) == 3


@pytest.mark.parametrize(
    "damage", ["", "[]", '{"KEY": 3}', '{"KEY": {"backends": ["flash"], "reason": "", "left_out": {}}}']
)
def test_a_damaged_table_is_measured_again(damage: str, tmp_path: Path):
    file = tmp_path / "attention.json"
    file.write_text(damage.replace("KEY", f"H200 {SHAPE.key()}"))
    given = {"machine": "H200", "file": file, "clock": clock({"b": 1.0}), "attends": {"sdpa": named("b")}}
    assert cached_choice(SHAPE, CPU, **given).backends == ("sdpa",)
    assert "as measured before" in cached_choice(SHAPE, CPU, **given).reason


def test_a_cache_folder_that_cannot_be_written_only_costs_the_measurement(tmp_path: Path):
    (tmp_path / "file").write_text("")
    given = {"machine": "H200", "clock": clock({"b": 1.0}), "attends": {"sdpa": named("b")}}
    assert cached_choice(SHAPE, CPU, file=tmp_path / "file" / "attention.json", **given).backends == ("sdpa",)


def test_candidates_are_what_the_device_and_the_model_have_kernels_for():
    pytest.importorskip("triton", reason="the kernels need triton")
    assert list(candidates_for(SHAPE, CUDA)) == ["triton", "sdpa", "varlen"]
    assert list(candidates_for(SHAPE._replace(softcap=30.0), CUDA)) == ["triton"]
    assert list(candidates_for(SHAPE._replace(compiled=True), CUDA)) == ["triton", "sdpa"]
    assert list(candidates_for(SHAPE._replace(dropout=0.1), CUDA)) == ["triton", "sdpa"]
    assert list(candidates_for(SHAPE._replace(dropout=0.1, backward=False), CUDA)) == ["triton", "sdpa", "varlen"]
    assert list(candidates_for(SHAPE._replace(head_dim=320), CUDA)) == ["sdpa"]


def test_on_a_cpu_auto_does_not_ask_the_preference():
    prefer(Choice(("varlen",), "a test", {}).preference())
    assert choose_backend(CPU)[0] == "sdpa"
    assert preferred().backends == ("varlen", "reference")
