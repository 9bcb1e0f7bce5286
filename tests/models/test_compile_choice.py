"""The probe of compiled blocks with a clock and a compiler of our own: what it times, what it refuses, when compiling pays."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from genai_pl.models import Decoder, ModelConfig
from genai_pl.models.compile_choice import (
    BlockCall,
    CompileChoice,
    Length,
    Timing,
    Tools,
    block_call,
    cached_timing,
    decide,
    time_block,
)
from genai_pl.strategies import recompute
from tests.conftest import some

CPU = torch.device("cpu")
SIZES = {
    "n_layer": 3, "n_head": 2, "n_embd": 16, "vocab_size": 11, "max_seq_len": 32, "init_std": 0.3, "position": "rotary",
}  # fmt: skip
BF16 = partial(torch.autocast, "cpu", torch.bfloat16)


def decoder(**options: object) -> Decoder:
    torch.manual_seed(0)
    return Decoder(ModelConfig(**{**SIZES, **options}))


def scaled(factor: float) -> Callable[[nn.Module], None]:
    """A compiler whose blocks give their output times a factor."""

    def compiler(block: nn.Module) -> None:
        forward = block.forward
        block.forward = lambda *args, **kwargs: forward(*args, **kwargs) * factor
        block.is_compiled = True

    return compiler


def fails(block: nn.Module) -> None:
    raise RuntimeError("no working compiler\nand more lines")


RIGHT = scaled(1.0)


def tools(compiler: Callable[[nn.Module], object] = RIGHT, *, plain: float = 1.8, compiled: float = 1.23) -> Tools:
    """Clocks that run a step and give the times of this call; compiling takes 12 s."""
    left = [plain, compiled]

    def clock(run: Callable[[], object]) -> float:
        run()
        return left.pop(0)

    def stopwatch(run: Callable[[], object]) -> float:
        run()
        return 12.0 + compiled / 1000

    return Tools(clock, stopwatch, compiler)


def timed(call: BlockCall, made: Tools, dtype: torch.dtype = torch.float32) -> Timing:
    return time_block(call, CPU, dtype, autocast=nullcontext if dtype is torch.float32 else BF16, tools=made)


def test_a_long_run_compiles_and_a_short_one_does_not():
    timing = Timing(plain=1.8, compiled=1.23, seconds=12.0)
    # 12 s / (0.57 ms x 24 passes of a block) = 877.2 steps
    assert decide(timing, Length(steps=5000, passes=24, graphs=1)) == CompileChoice(
        True,
        "one block 1.23 ms against 1.8, 12 s of compilation pay after 878 of 5,000 steps (compile=false turns it off)",
    )
    short = decide(timing, Length(steps=878, passes=24, graphs=1))
    assert short.line() == (
        "off: one block 1.23 ms against 1.8, 12 s of compilation would pay after 878 steps, and the run has 878 "
        "(compile=true turns it on)"
    )
    assert decide(timing, Length(steps=879, passes=24, graphs=1)).on
    assert not decide(timing, Length(steps=879, passes=24, graphs=2)).on
    assert not decide(timing, Length(steps=879, passes=12, graphs=1)).on


@pytest.mark.parametrize("compiled", [1.8, 2.0])
def test_a_compiled_block_that_is_no_faster_never_pays(compiled: float):
    choice = decide(Timing(1.8, compiled, 0.0), Length(10**9, 24, 1))
    assert choice == CompileChoice(False, f"one block {compiled:.3g} ms against 1.8: it is no faster compiled")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", some([{}, {"dropout": 0.5}]), ids=str)
def test_a_right_compiled_block_is_timed_and_the_model_stays_as_it_was(options: dict, dtype: torch.dtype):
    model = decoder(**options)
    weights = {name: p.clone() for name, p in model.state_dict().items()}
    model.blocks[0].mlp.up_proj.weight.grad = torch.ones_like(model.blocks[0].mlp.up_proj.weight)
    state = torch.get_rng_state()
    timing = timed(block_call(model, 2, 12), tools(), dtype)
    assert timing == Timing(1.8, 1.23, pytest.approx(12.0))
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(model.state_dict(), weights, rtol=0, atol=0)
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["blocks.0.mlp.up_proj.weight"]
    assert not hasattr(model.blocks[0], "is_compiled")
    assert not any(block._forward_pre_hooks or "forward" in vars(block) for block in model.blocks)


@pytest.mark.parametrize(
    ("compiler", "words"),
    [
        (scaled(1.2), "a compiled block is wrong here (error 0.2, "),
        (scaled(float("nan")), "a compiled block is wrong here (error nan, "),
        (fails, "the compiler failed (RuntimeError: no working compiler)"),
    ],
)
@pytest.mark.parametrize("options", [{}, {"dropout": 0.5}], ids=str)
def test_a_compiler_that_fails_or_errs_leaves_blocks_plain(options: dict, compiler: Callable, words: str):
    timing = timed(block_call(decoder(**options), 2, 12), tools(compiler), torch.bfloat16)
    choice = decide(timing, Length(10**9, 24, 1))
    assert not choice.on
    assert choice.reason.startswith(words)
    assert "\n" not in choice.reason


def test_a_gradient_alone_that_is_wrong_is_found():
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, d_y: Tensor) -> Tensor:
            return d_y * float("nan")

    def compiler(block: nn.Module) -> None:
        forward = block.forward
        block.forward = lambda *args, **kwargs: Wrong.apply(forward(*args, **kwargs))

    assert timed(block_call(decoder(), 2, 12), tools(compiler)).fault.startswith("a compiled block is wrong here")


def test_a_block_that_cannot_run_alone_is_a_line():
    call = block_call(decoder(), 2, 12)._replace(args=("no tensor",))
    assert timed(call, tools()).fault.startswith("a block cannot be timed alone (AttributeError:")


def test_the_times_are_kept_and_faults_are_not(tmp_path: Path):
    file, call = tmp_path / "compile.json", block_call(decoder(), 2, 12)
    probe = partial(cached_timing, device=CPU, autocast=nullcontext, machine="a GPU", file=file)
    assert probe(call, dtype=torch.float32, tools=tools(fails)).fault
    first = probe(call, dtype=torch.float32, tools=tools())
    assert first.fault is None
    # another model of the same sizes; no clock is read
    again = block_call(decoder(), 2, 12)
    assert probe(again, dtype=torch.float32, tools=Tools(None, None, fails)) == first
    for other in (block_call(decoder(), 4, 12), block_call(decoder(n_embd=32), 2, 12)):
        assert probe(other, dtype=torch.float32, tools=tools(plain=3.0)).plain == 3.0
    file.write_text('{"a": 1')
    assert probe(call, dtype=torch.float32, tools=tools(plain=4.0)).plain == 4.0
    file.write_text(file.read_text().replace("4.0", '"4.0"'))
    assert probe(call, dtype=torch.float32, tools=tools(plain=5.0)).plain == 5.0


def test_the_commonest_block_is_timed_on_what_it_gets_in_a_pass():
    model = decoder(window=4, n_layer=4, full_every=4)
    call = block_call(model, 2, 12)
    assert call.block is model.blocks[0]
    assert (call.kinds, call.args[1].window, call.args[1].segments.unique().tolist()) == (2, 4, [1, 2])
    mixture = decoder(n_experts=2, expert_size=8, n_dense_layers=1)
    call = block_call(mixture, 2, 12)
    assert (call.block, call.kinds) == (mixture.blocks[1], 2)
    assert torch.equal(call.args[0], mixture.embed(torch.zeros(2, 12, dtype=torch.long)))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [None, "selective"])
def test_torch_compiles_the_copy(kind: str | None):
    """Real dynamo and autograd tracing, no code generator, with recomputed blocks too."""
    torch.compiler.reset()
    model = decoder(n_layer=1)
    if kind:
        recompute(model, 1, kind=kind)
    compiler = lambda block: block.compile(backend="aot_eager")  # noqa: E731
    assert timed(block_call(model, 2, 12), tools(compiler)).fault is None
    assert model.blocks[0]._compiled_call_impl is None


def test_a_run_in_bfloat16_has_a_block_and_an_input_in_it():
    call = block_call(decoder(), 2, 12)
    cast = call.in_dtype(torch.bfloat16)
    assert (cast.args[0].dtype, cast.block.mlp.up_proj.weight.dtype) == (torch.bfloat16, torch.bfloat16)
    assert call.block.mlp.up_proj.weight.dtype is torch.float32
    assert time_block(cast, CPU, torch.bfloat16, autocast=nullcontext, tools=tools()).fault is None
