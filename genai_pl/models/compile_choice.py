"""Compile choice: whether compiled blocks pay for one run, by timing one of them on a batch of the run's own shape.

torch.compile takes seconds to minutes before the first step, and makes each later one shorter: only both times together, and
the length of the run, tell whether it is worth it. A copy of one block is timed forward and backward, plain and compiled, and
the results are compared. What was measured is kept beside the table of attention's choices, under the name of the GPU,
versions, block and batch; whether it pays is decided anew for every run.

Nothing here needs a GPU: compiler and clocks are arguments.
"""

import dataclasses
import hashlib
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from genai_pl.kernels.attention_probe import (
    FLOOR,
    WRONG,
    Clock,
    add_entry,
    first_line,
    gpu_clock,
    read_table,
    relative_error,
)
from genai_pl.kernels.preference import preferred
from genai_pl.models.protocol import LanguageModel

Context = Callable[[], AbstractContextManager]
TF32 = 2.0**-10  # relative step of float32 products on tensor cores


class Tools(NamedTuple):
    """What measures: clock gives milliseconds of a call, the usual one of many; stopwatch seconds of the one call it makes;
    compiler compiles a block in place, at its first call or before.
    """

    clock: Clock
    stopwatch: Callable[[Callable[[], object]], float]
    compiler: Callable[[nn.Module], object] = nn.Module.compile


class Timing(NamedTuple):
    """Forward and backward of one block: plain and compiled in ms, what compiling it took in s. fault: why it cannot be used."""

    plain: float = 0.0
    compiled: float = 0.0
    seconds: float = 0.0
    fault: str | None = None


class CompileChoice(NamedTuple):
    """on: whether blocks are compiled. reason: for the log."""

    on: bool
    reason: str

    def line(self) -> str:
        """The choice in one line."""
        return f"{'on' if self.on else 'off'}: {self.reason}"


class Length(NamedTuple):
    """How often a run computes blocks: optimizer steps, passes of a block in each, graphs that must be compiled for it."""

    steps: int
    passes: int
    graphs: int


class BlockCall(NamedTuple):
    """One block with the arguments that a pass over a batch gives it, on any device; kinds: different blocks of the model."""

    block: nn.Module
    args: tuple
    kwargs: dict[str, object]
    kinds: int

    def in_dtype(self, dtype: torch.dtype) -> "BlockCall":
        """A copy of the block and its input in a dtype, for runs that hold all weights in it."""
        if self.args:
            given = {"args": (self.args[0].to(dtype), *self.args[1:])}
        else:
            name = next(iter(self.kwargs))
            given = {"kwargs": {**self.kwargs, name: self.kwargs[name].to(dtype)}}
        return self._replace(block=deepcopy(self.block).to(dtype), **given)

    def key(self) -> str:
        """The block and its arguments as text, for a table: modules, parameters, shapes, the backends of attention."""
        given = [(tuple(x.shape), x.dtype) for x in _tensors((self.args, self.kwargs))]
        forward = type(self.block.__dict__.get("forward")).__name__  # recomputed blocks have one of their own
        text = f"{_kind(self.block)} {given} {forward} {preferred().backends}"
        return f"{type(self.block).__name__} {hashlib.sha256(text.encode()).hexdigest()[:32]}"


def decide(timing: Timing, length: Length) -> CompileChoice:
    """Compiled blocks where all steps save more than compiling takes, plain ones otherwise and after any fault."""
    if timing.fault is not None:
        return CompileChoice(False, timing.fault)
    both = f"one block {timing.compiled:.3g} ms against {timing.plain:.3g}"
    saved = (timing.plain - timing.compiled) / 1000 * length.passes  # s of a step
    if not saved > 0:
        return CompileChoice(False, f"{both}: it is no faster compiled")
    cost = timing.seconds * length.graphs
    after = math.ceil(cost / saved)
    if after < length.steps:
        pays = f"{cost:.3g} s of compilation pay after {after:,} of {length.steps:,} steps"
        return CompileChoice(True, f"{both}, {pays} (compile=false turns it off)")
    pays = f"{cost:.3g} s of compilation would pay after {after:,} steps, and the run has {length.steps:,}"
    return CompileChoice(False, f"{both}, {pays} (compile=true turns it on)")


def cached_timing(
    call: BlockCall,
    device: torch.device,
    dtype: torch.dtype,
    *,
    autocast: Context,
    machine: str,
    file: Path,
    tools: Tools,
) -> Timing:
    """`time_block`, or what it has found before on such a machine; file: the table, which a damaged one becomes anew.

    machine: the name of the GPU with the versions of its software.
    """
    key = f"{machine} {call.key()} dtype={dtype} matmul={torch.get_float32_matmul_precision()}"
    if (known := _as_timing(read_table(file).get(key))) is not None:
        return known
    timing = time_block(call, device, dtype, autocast=autocast, tools=tools)
    if timing.fault is None:  # a fault may be gone in the next run: a full memory, a compiler that was not installed
        add_entry(file, key, {name: x for name, x in timing._asdict().items() if name != "fault"})
    return timing


def time_block(call: BlockCall, device: torch.device, dtype: torch.dtype, *, autocast: Context, tools: Tools) -> Timing:
    """The times of a copy of the block on a device, products in dtype as `autocast` has them.

    The block, its gradients and the state of random numbers are as before. An exception, or numbers that are not those of the
    plain block, are a fault.
    """
    gpus = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(gpus), torch.enable_grad():
        try:
            copy = deepcopy(call.block).to(device).train()
            step = _step(copy, *_moved((call.args, call.kwargs), device), autocast)
            # what is random is compared without being so
            expected = step()
            is_random = _worst(step(), expected) > _tolerance(dtype)
            expected = _evaluating(copy, step) if is_random else expected
            plain = tools.clock(step)
        except Exception as error:
            return Timing(fault=f"a block cannot be timed alone ({first_line(error)})")
        try:
            tools.compiler(copy)
            first = tools.stopwatch(step)
            error = _worst(_evaluating(copy, step) if is_random else step(), expected)
            if not error <= _tolerance(dtype):  # NaN too
                return Timing(
                    fault=f"a compiled block is wrong here (error {error:.1g}, {_tolerance(dtype):.1g} is allowed)"
                )
            compiled = tools.clock(step)
        except Exception as error:
            return Timing(fault=f"the compiler failed ({first_line(error)})")
    return Timing(plain, compiled, max(0.0, first - compiled / 1000))


def block_call(model: LanguageModel, rows: int, length: int) -> BlockCall:
    """The commonest block of a model with its arguments in a pass over rows of packed documents; the model is as before.

    rows, length: of the batch. Blocks before it are skipped, and nothing after it is computed.
    """
    kinds = [_kind(block) + str(window) for block, window in zip(model.blocks, _windows(model), strict=True)]
    ((commonest, _),) = Counter(kinds).most_common(1)
    n = kinds.index(commonest)
    device = model.embed.weight.device
    ids = torch.zeros(rows, length, dtype=torch.long, device=device)
    segments = torch.ones_like(ids)
    segments[:, length // 3 :] = 2
    found: list[tuple] = []

    def stop(_: nn.Module, args: tuple, kwargs: dict[str, object]) -> None:
        found.append((args, kwargs))
        raise _Reached

    with torch.random.fork_rng([]), torch.no_grad(), _skipped(model.blocks[:n]):
        handle = model.blocks[n].register_forward_pre_hook(stop, with_kwargs=True)
        try:
            model.features(ids, segments)
        except _Reached:
            pass
        finally:
            handle.remove()
    ((args, kwargs),) = found
    return BlockCall(model.blocks[n], args, kwargs, len(set(kinds)))


def gpu_tools() -> Tools:
    """The clocks of a GPU and torch's compiler."""

    def stopwatch(run: Callable[[], object]) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        return time.perf_counter() - start

    return Tools(gpu_clock, stopwatch)


def compile_blocks(model: LanguageModel) -> None:
    """Compile every block of a model in place, each at its first call."""
    for block in model.blocks:
        block.compile()


class _Reached(Exception):
    """The block whose arguments are wanted is called."""


def _step(block: nn.Module, args: tuple, kwargs: dict[str, object], autocast: Context) -> Callable[[], list[Tensor]]:
    """A function that runs the block forward and backward: its output, and the gradients of its input and its parameters.

    The gradients of parameters are one vector: some, as those of keys' biases, are nothing but rounding.
    """
    name = None if args else next(iter(kwargs))  # the input comes first
    x = args[0] if args else kwargs[name]
    leaf = x.detach().clone().requires_grad_()
    args, kwargs = (leaf, *args[1:]) if args else (), kwargs if args else {**kwargs, name: leaf}
    d_y = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x.device)
    leaves = [leaf, *(p for p in block.parameters() if p.requires_grad)]

    def run() -> list[Tensor]:
        with autocast():
            y = block(*args, **kwargs)
        y = y[0] if isinstance(y, tuple) else y
        d_x, *d_parameters = torch.autograd.grad(y, leaves, d_y.to(y.dtype), allow_unused=True)
        vectors = [d.detach().float().flatten() for d in d_parameters if d is not None]
        return [y.detach(), d_x, *([torch.cat(vectors)] if vectors else [])]

    return run


def _evaluating(block: nn.Module, step: Callable[[], list[Tensor]]) -> list[Tensor]:
    """The results of a step in evaluation mode."""
    block.eval()
    try:
        return step()
    finally:
        block.train()


def _worst(results: list[Tensor], expected: list[Tensor]) -> float:
    """The largest relative error, NaN if any is."""
    return relative_error(results, [x.double() for x in expected])


def _tolerance(dtype: torch.dtype) -> float:
    """The relative error that two orders of the same operations may differ by, with products in dtype."""
    rough = dtype is torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return WRONG * (TF32 if rough else torch.finfo(dtype).eps) + FLOOR


def _kind(block: nn.Module) -> str:
    """What a compiled graph depends on: modules, and shapes, dtypes and gradients of parameters."""
    parameters = [(name, tuple(p.shape), p.dtype, p.requires_grad) for name, p in block.named_parameters()]
    return f"{block} {parameters}"


def _windows(model: LanguageModel) -> list[int | None]:
    """The window of each block; those of other models are in their arguments."""
    return getattr(model, "windows", None) or [None] * len(model.blocks)


@contextmanager
def _skipped(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Let blocks pass their input on."""
    before = [(block, block.__dict__.get("forward")) for block in dict.fromkeys(blocks)]
    for block, _ in before:
        block.forward = lambda x, *_, **__: x
    try:
        yield
    finally:
        for block, forward in before:
            del block.forward
            if forward is not None:
                block.forward = forward


def _moved(value: object, device: torch.device) -> object:
    """A value with all its tensors on a device: those in tuples, lists, dictionaries and the fields of a dataclass."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_moved(x, device) for x in value))
    if isinstance(value, (tuple, list)):
        return type(value)(_moved(x, device) for x in value)
    if isinstance(value, dict):
        return {name: _moved(x, device) for name, x in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [field.name for field in dataclasses.fields(value) if field.init]
        return dataclasses.replace(value, **{name: _moved(getattr(value, name), device) for name in fields})
    return value


def _tensors(value: object) -> Iterator[Tensor]:
    """The tensors that `_moved` moves, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for x in value:
            yield from _tensors(x)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from _tensors([getattr(value, field.name) for field in dataclasses.fields(value) if field.init])


def _as_timing(entry: object) -> Timing | None:
    """The timing of an entry of the table, None for one that is none."""
    if not isinstance(entry, dict) or set(entry) != {"plain", "compiled", "seconds"}:
        return None
    is_right = all(isinstance(x, (int, float)) and math.isfinite(x) and x >= 0 for x in entry.values())
    return Timing(**entry) if is_right else None
