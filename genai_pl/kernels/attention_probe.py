"""Attention probe: which backends are right on this GPU, and the fastest of them, for the shape of one model.

Names of GPUs and versions do not tell whether a kernel compiles, is right and is fast there; a small case and a few
milliseconds of the run's own shape do. Every candidate is compared with the reference first: one that raises or is wrong is
left out, with a line. The others are timed, and the choice is kept in the user's cache folder under the name of the GPU, the
versions of torch and triton, and the shape, so that a machine measures each shape once.

Nothing here needs a GPU: candidates and the clock are arguments.
"""

import json
import os
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from genai_pl.atomic_io import write_atomic
from genai_pl.kernels.attention import BACKENDS, attention_with, unsupported
from genai_pl.kernels.mask import AttentionMask
from genai_pl.kernels.preference import Preference
from genai_pl.kernels.score_options import ScoreOptions

Attend = Callable[[Tensor, Tensor, Tensor, AttentionMask, ScoreOptions], Tensor]
Clock = Callable[[Callable[[], None]], float]

CANDIDATES = ("triton", "sdpa", "varlen")
SMALL = 150  # tokens of the case that is compared: more than one block of a kernel, and no multiple of one
TOKENS = 8192  # of the batch that is timed
WRONG = 8.0  # times the error of eager code in the same dtype: rounding stays far below, a wrong mask far above
FLOOR = 1e-5  # an error that is never wrong: of float32 products on tensor cores


class ProbeShape(NamedTuple):
    """What the attention of a model looks like to a kernel.

    n_head, n_kv_head, head_dim, dtype: of queries, keys and products. length: tokens of a row. causal, window: of its masks.
    softcap, sinks, alibi, bias, dropout: of its scores. backward: whether gradients are computed. compiled: by torch.compile
    """

    n_head: int
    n_kv_head: int
    head_dim: int
    dtype: torch.dtype
    length: int
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    alibi: bool = False
    bias: bool = False
    dropout: float = 0.0
    backward: bool = True
    compiled: bool = False

    def key(self) -> str:
        """The shape as text, for a table of choices."""
        return " ".join(f"{name}={value}" for name, value in self._asdict().items())

    def describe(self) -> str:
        """The shape for a line that a person reads."""
        kind = str(self.dtype).removeprefix("torch.")
        return f"{self.n_head} heads of {self.head_dim}, rows of {self.length:,} tokens, {kind}"


class Choice(NamedTuple):
    """backends: those that are right, the fastest first. reason: for the log. left_out: why others are none of them."""

    backends: tuple[str, ...]
    reason: str
    left_out: dict[str, str]

    def preference(self) -> Preference:
        """The choice as `attention` reads it: what none of these can compute is left to the reference."""
        return Preference((*self.backends, "reference"), self.reason)

    def lines(self) -> list[str]:
        """The choice in one line, and one for each backend that is left out."""
        first = self.backends[0] if self.backends else "reference"
        return [f"{first}: {self.reason}", *(f"{name} is left out: {why}" for name, why in self.left_out.items())]


def cached_choice(
    shape: ProbeShape, device: torch.device, *, machine: str, file: Path, clock: Clock, attends: Mapping[str, Attend]
) -> Choice:
    """`choose`, or what it has found before on such a machine; file: the table of choices, which a damaged one becomes anew.

    machine: the name of the GPU with the versions of its software.
    """
    table, key = read_table(file), f"{machine} {shape.key()}"
    if (known := _as_choice(table.get(key))) is not None:
        return known._replace(reason=f"{known.reason}, as measured before")
    choice = choose(shape, device, clock=clock, attends=attends)
    add_entry(file, key, choice._asdict())
    return choice


def choose(
    shape: ProbeShape,
    device: torch.device,
    *,
    clock: Clock,
    attends: Mapping[str, Attend],
    keep: tuple[str, ...] | None = None,
) -> Choice:
    """The candidates that are right, in the order of their times for this shape.

    attends: attention functions by name. clock: milliseconds that a function takes. keep: the order of a run that goes on,
    whose backends are compared with the reference, and not timed. The state of random numbers is as before.
    """
    left_out: dict[str, str] = {}
    times: dict[str, float] = {}
    gpus = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(gpus), torch.set_grad_enabled(shape.backward):
        for name in attends if keep is None else keep:
            fault = fault_of(attends[name], shape, device) if name in attends else "it is no candidate here"
            if fault is None and keep is None:
                try:
                    times[name] = sum(clock(step) for step in _steps(attends[name], shape, device))
                except Exception as error:
                    fault = first_line(error)
            if fault is not None:
                left_out[name] = fault
    if keep is not None:
        return Choice(tuple(name for name in keep if name not in left_out), "as the run began", left_out)
    order = tuple(sorted(times, key=times.__getitem__))
    return Choice(order, _reason(order, times, shape), left_out)


def fault_of(attend: Attend, shape: ProbeShape, device: torch.device) -> str | None:
    """What is wrong with an attention function on a small case of a shape; None if it gives the reference's numbers.

    Output and gradients of a plain and a packed batch, against float64; the error of eager code in the same dtype is the
    measure. An exception is a fault.
    """
    masks = _masks(shape, 2, SMALL, device)
    try:
        for kind, mask in masks.items():
            given = _given(shape, 2, SMALL, device)
            exact = _results(_reference, shape, given, mask, torch.float64)
            both = (_results(other, shape, given, mask, shape.dtype) for other in (attend, _reference))
            errors = [relative_error(results, exact) for results in both]
            if not errors[0] <= WRONG * errors[1] + FLOOR:  # NaN too
                return f"it is wrong on this GPU ({kind} rows: error {errors[0]:.1g}, eager code's {errors[1]:.1g})"
    except Exception as error:
        return first_line(error)
    return None


def candidates_for(shape: ProbeShape, device: torch.device) -> dict[str, Attend]:
    """The attention functions of `CANDIDATES` that this device and shape have kernels for, by name."""
    attends = {}
    for name in CANDIDATES:
        options = shape_options(shape, torch.device("cpu"))._replace(dropout_p=shape.dropout if shape.backward else 0.0)
        given = {"lengths": (SMALL, SMALL), "mask": AttentionMask(causal=shape.causal, window=shape.window)}
        lacks = unsupported(name, device, head_dim=shape.head_dim, dtype=shape.dtype, options=options, **given)
        if lacks is None and not (shape.compiled and name == "varlen"):
            attends[name] = partial(attention_with, backend=name)
    return attends


def shape_options(shape: ProbeShape, device: torch.device) -> ScoreOptions:
    """Score options of a shape with slopes, sinks and a bias of small numbers."""
    per_head = torch.linspace(0.05, 0.5, shape.n_head, device=device)
    return ScoreOptions(
        softcap=shape.softcap,
        alibi=per_head if shape.alibi else None,
        sinks=per_head if shape.sinks else None,
        bias=per_head.view(-1, 1, 1) if shape.bias else None,
    )


def gpu_clock(run: Callable[[], None], *, repeats: int = 10) -> float:
    """Milliseconds that a GPU takes for a function: the median of some calls, after three for caches and compilers."""
    for _ in range(3):
        run()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    torch.cuda.synchronize()
    times = sorted(a.elapsed_time(b) for a, b in pairwise(marks))
    return times[repeats // 2]


def machine_of(device: torch.device) -> str:
    """The GPU and the versions that decide how fast and how right its kernels are."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    versions = f"torch {torch.__version__}, triton {triton}, cuda {torch.version.cuda or torch.version.hip}"
    return f"{torch.cuda.get_device_name(device)}, {versions},"


def table_file(name: str = "attention") -> Path:
    """The user's table of what probes of a name have found."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "genai_pl" / f"{name}.json"


def _masks(shape: ProbeShape, B: int, T: int, device: torch.device) -> dict[str, AttentionMask]:
    """The masks of a batch of B rows: whole rows, and two documents with padding in each."""
    segments = torch.ones(B, T, dtype=torch.long, device=device)
    segments[:, T // 3 :] = 2
    segments[:, T - T // 20 :] = 0
    rules = {"causal": shape.causal, "window": shape.window}
    return {"plain": AttentionMask(**rules), "packed": AttentionMask(**rules, segments=segments)}


def _given(shape: ProbeShape, B: int, T: int, device: torch.device) -> list[Tensor]:
    """Queries, keys, values and a gradient of the output, (B, H or K, T, D), as layers lay them out."""
    generator = torch.Generator().manual_seed(0)
    heads = (shape.n_head, shape.n_kv_head, shape.n_kv_head, shape.n_head)
    drawn = (torch.randn(B, T, n, shape.head_dim, generator=generator) for n in heads)
    return [x.to(device, shape.dtype).transpose(1, 2) for x in drawn]


def _results(
    attend: Attend, shape: ProbeShape, given: list[Tensor], mask: AttentionMask, dtype: torch.dtype
) -> list[Tensor]:
    """The output of attention and, for a shape with a backward pass, the gradients of queries, keys and values."""
    q, k, v, d_o = (x.to(dtype) for x in given)
    leaves = [x.detach().requires_grad_(shape.backward) for x in (q, k, v)]
    options = shape_options(shape, q.device)
    bias = options.bias
    y = attend(*leaves, mask, options if bias is None else options._replace(bias=bias.to(dtype)))
    return [y.detach(), *(torch.autograd.grad(y, leaves, d_o) if shape.backward else ())]


def _reference(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, options: ScoreOptions) -> Tensor:
    return attention_with(q, k, v, mask, options, backend="reference")


def relative_error(results: list[Tensor], exact: list[Tensor]) -> float:
    """The largest relative error of some tensors; NaN if any is, which Python's max may pass over."""
    pairs = zip(results, exact, strict=True)
    return torch.stack([(a.double() - b).norm() / b.norm().clamp_min(1e-30) for a, b in pairs]).max().item()


def _steps(attend: Attend, shape: ProbeShape, device: torch.device) -> list[Callable[[], None]]:
    """What is timed: a pass over a batch of whole rows, and one over packed rows."""
    B = max(1, TOKENS // shape.length)
    given = _given(shape, B, shape.length, device)
    masks = _masks(shape, B, shape.length, device).values()
    attend = _with_dropout(attend, shape.dropout) if shape.backward and shape.dropout else attend
    return [partial(_run, attend, shape, given, mask) for mask in masks]


def _run(attend: Attend, shape: ProbeShape, given: list[Tensor], mask: AttentionMask) -> None:
    _results(attend, shape, given, mask, shape.dtype)


def _with_dropout(attend: Attend, dropout_p: float) -> Attend:
    """The attention function with dropout, which is timed and not compared: it is random."""

    def dropping(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, options: ScoreOptions) -> Tensor:
        return attend(q, k, v, mask, options._replace(dropout_p=dropout_p))

    return dropping


def _reason(order: tuple[str, ...], times: Mapping[str, float], shape: ProbeShape) -> str:
    """The times of a choice, for the log."""
    if not order:
        return "no other backend is right on this GPU"
    passes = "forward and backward" if shape.backward else "forward"
    measured = ", ".join(f"{name} {times[name]:.3g} ms" for name in order)
    fastest = "the fastest here" if len(order) > 1 else "the only one here"
    return f"{fastest} ({measured}; {passes}, {shape.describe()})"


def first_line(error: Exception) -> str:
    """An error's kind and the first line of its message."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:200]


def add_entry(file: Path, key: str, entry: dict[str, object]) -> None:
    """Write an entry into a table, beside those that others have written meanwhile."""
    try:
        text = json.dumps({**read_table(file), key: entry}, indent=1)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, lambda path: path.write_text(text, encoding="utf-8"))
    except OSError:  # a read-only home, a full disk: the next run measures again
        pass


def read_table(file: Path) -> dict[str, object]:
    """A table of what was found, empty where there is none that can be read."""
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return table if isinstance(table, dict) else {}


def _as_choice(entry: object) -> Choice | None:
    """The choice of an entry of the table, None for one that is none."""
    if not isinstance(entry, dict) or set(entry) != set(Choice._fields):
        return None
    backends, reason, left_out = entry["backends"], entry["reason"], entry["left_out"]
    right = isinstance(backends, list) and all(name in BACKENDS and name != "auto" for name in backends)
    if not (right and isinstance(reason, str) and isinstance(left_out, dict)):
        return None
    return Choice(tuple(backends), reason, {str(name): str(why) for name, why in left_out.items()})
