"""What the compilers make of every Triton kernel, without a GPU: `python benchmarks/kernels_static.py [--check]`.

Registers, spills, shared memory, programs that fit a multiprocessor, tensor-core instructions and code size at the block
sizes that the launcher chooses. Beside them the kernels of flash-attn and Liger Kernel, where they are installed (or
unpacked on PYTHONPATH). It says what a kernel can do at most, not how long it takes.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # the interpreter has no compiler

import torch
from kernels_compile import TARGETS, Report, Target, compile_launch
from kernels_peers import flash_attn_launches, liger_launches
from torch import Tensor

from genai_pl.kernels.flash.common import Extras
from genai_pl.kernels.flash.compile import launches
from genai_pl.kernels.flash.launch import Launch
from genai_pl.kernels.flash.problem import Case
from genai_pl.kernels.softmax_triton import Softmax, softmax_launch

B, H, T, V = 2, 16, 4096, 128256
CAUSAL = Case(True, 0, False, False, 0, 0.1, 0.0, 0.0, False)
MATRIX_KERNELS = {"forward", "split", "key_value", "query", "bias"}
NAMES = {"key_value": "dK, dV", "query": "dQ", "bias": "d bias", "row_sums": "delta"}
Named = tuple[str, Launch]


def tensors(D: int, dtype: torch.dtype, *, n_query: int = T, n_kv_head: int = H) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as a model lays them out; they need no memory."""
    shapes = ((n_query, H), (T, n_kv_head), (T, n_kv_head))
    q, k, v = (torch.empty(B, n, heads, D, dtype=dtype, device="meta").transpose(1, 2) for n, heads in shapes)
    return q, k, v


def everything() -> tuple[Extras, Case]:
    """Every feature at once, as no model has them."""
    empty = torch.empty
    tables = [empty(B, 8, T, dtype=torch.int32, device="meta") for _ in range(2)]
    bias, alibi = empty(1, H, T, T, device="meta"), empty(H, device="meta")
    seed = empty(1, dtype=torch.int64, device="meta")
    sinks = empty(H, device="meta")
    return Extras(bias, alibi, *tables, seed, sinks), Case(True, 1024, True, True, 0, 0.1, 30.0, 0.1, True)


def attention_launches(arch: str) -> Iterator[Named]:
    extras, all_features = everything()
    packed = Extras(queries=extras.queries, keys=extras.keys)
    bf16 = torch.bfloat16
    for D in (64, 128):
        cases = [
            ("causal", tensors(D, bf16), Extras(), CAUSAL, {"forward", "key_value", "query", "row_sums"}),
            ("packed", tensors(D, bf16), packed, CAUSAL._replace(segments=True), {"forward", "key_value", "query"}),
            ("sinks", tensors(D, bf16), Extras(sinks=extras.sinks), CAUSAL, {"forward", "row_sums"}),
            ("all features", tensors(D, bf16), extras, all_features, MATRIX_KERNELS),
            ("GQA", tensors(D, bf16, n_kv_head=H // 4), Extras(), CAUSAL, {"key_value"}),
            ("decode", tensors(D, bf16, n_query=1), Extras(), CAUSAL, {"split", "combine"}),
        ]
        if D == 64:
            cases.append(("causal fp32", tensors(D, torch.float32), Extras(), CAUSAL, MATRIX_KERNELS))
        for name, qkv, extra, case, kernels in cases:
            for launch in launches(*qkv, extra, case, arch):
                if launch.name in kernels:
                    yield f"{NAMES.get(launch.name, launch.name)} d{D} {name}", launch


def softmax_launches() -> Iterator[Named]:
    labels, bias = torch.empty(1024, dtype=torch.int64, device="meta"), torch.empty(V, device="meta")
    weights = torch.empty(1024, device="meta")
    options = {"softcap": 30.0, "label_smoothing": 0.1, "z_loss": 1e-4, "bias": bias, "weights": weights}
    for name, dtype, chosen in (
        ("bf16", torch.bfloat16, {}),
        ("bf16 forward only", torch.bfloat16, {"with_gradients": False}),
        ("bf16 all options", torch.bfloat16, options),
        ("fp32", torch.float32, {}),
    ):
        logits = torch.empty(1024, V, dtype=dtype, device="meta")
        yield f"cross entropy {name}", softmax_launch(logits, labels, logits, Softmax(**chosen))[0]


def peers(target: Target, folder: Path) -> Iterator[Named]:
    yield from flash_attn_launches(folder)
    yield from liger_launches(V, hip=target.gpu.backend == "hip")


def row(name: str, target: Target, launch: Launch, report: Report) -> str:
    F = next((x for x in launch.args if type(x).__name__ == "Features"), None)
    blocks = f"{F.BLOCK_M}x{F.BLOCK_N}" if F is not None and launch.name in MATRIX_KERNELS else ""
    cells = (
        f"{name:34s}", f"{target.name:6s}", f"{blocks:7s}", f"{launch.options['num_warps']:2d}",
        f"{report.registers:3d}", f"{report.spilled:5d}", f"{report.shared:6d}", f"{report.programs:2d}",
        f"{report.tensor_kind:5s} {report.n_tensor:4d}", f"{report.code / 1024:5.1f}",
    )  # fmt: skip
    return "| " + " | ".join(cells) + " |" + "".join(f" {warning}" for warning in report.warnings)


HEADER = """\
| kernel | target | blocks | warps | registers | spilled bytes | shared bytes | programs per SM | tensor cores | code KiB |
|---|---|---|---|---|---|---|---|---|---|"""


def failures(name: str, target: Target, launch: Launch, report: Report) -> Iterator[str]:
    """How a kernel of ours misses the bar."""
    place = f"{name} on {target.name}"
    if report.programs == 0:
        yield f"{place}: {report.shared} bytes of shared memory or {report.registers} registers do not fit"
    if launch.name in MATRIX_KERNELS and "fp32" not in name and report.n_tensor == 0:
        yield f"{place}: no tensor-core instruction"
    plain = name.endswith((" causal", " sinks")) or launch.name == "softmax"
    if plain and target.gpu.backend == "cuda" and report.spilled:
        yield f"{place}: spills {report.spilled} bytes"


def table(title: str, wanted: list[tuple[Target, Named]], *, checks: bool) -> list[str]:
    """Print a table, with progress on stderr; returns what misses the bar, if that `checks`."""
    if not wanted:
        return []
    print(f"\n{title}\n\n{HEADER}", flush=True)
    missed = []
    for n, (target, (name, launch)) in enumerate(wanted, 1):
        print(f"[{n}/{len(wanted)}] {name} for {target.name}", file=sys.stderr, flush=True)
        report = compile_launch(launch, target)
        print(row(name, target, launch, report), flush=True)
        missed += failures(name, target, launch, report) if checks else ()
    return missed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", default=",".join(TARGETS), help="any of " + ",".join(TARGETS))
    parser.add_argument("--filter", default="", help="only kernels whose name contains this")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--check", action="store_true", help="exit 1 where one of our kernels misses the bar")
    options = parser.parse_args()
    targets = [TARGETS[name] for name in options.targets.split(",")]
    ours = [(t, x) for t in targets for x in (*attention_launches(t.arch), *softmax_launches())]
    missed = table("Ours", [x for x in ours if options.filter in x[1][0]], checks=True)
    if not options.no_peers:
        with tempfile.TemporaryDirectory() as folder:
            others = [(t, x) for t in targets for x in peers(t, Path(folder))]
            table("Others", [x for x in others if options.filter in x[1][0]], checks=False)
    for line in missed:
        print(f"below the bar: {line}", file=sys.stderr)
    sys.exit(1 if options.check and missed else 0)


if __name__ == "__main__":
    main()
