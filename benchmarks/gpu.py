"""All that one GPU can tell, in eight minutes: python benchmarks/gpu.py [--out gpu.json] [STAGE ...]

Stages, in this order, each with lines of its own and an entry in the JSON file; one that fails says so and the next begins:

numbers        attention of the Triton kernels, forward and backward, in bf16 and fp16 against float64: masks, options of the
               scores, head sizes, 32k keys; linear cross entropy likewise. Wrong is more than twice the error of eager code
attention      milliseconds, TFLOP/s and MiB beside SDPA's backends, varlen_attn and FlexAttention
cross_entropy  the same of linear cross entropy beside full logits
training       tokens per second, MFU and memory of `train.py`, eager and compiled
decoding       tokens per second of random weights, for one row and for 16

--interpret runs all stages on tiny shapes without a GPU: numbers count, times are left out. --minutes: no stage or case
begins later. The file is written after every case, and an exit status of 1 says that numbers were wrong or a stage failed.
"""

import argparse
import csv
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
if "--interpret" in sys.argv:  # before Triton is imported
    os.environ |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from kernels import TOKENS, attends, attention_figures, full_logits, milliseconds, peak_mib, segments_of  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402

from genai_pl.kernels import AttentionMask, ScoreOptions, attention, attention_with, linear_cross_entropy  # noqa: E402

Figures = dict[str, Any]
Case = tuple[str, Callable[[], Figures]]  # a name, and what measures it
ALLOWED = 2.0  # times the error of eager code in the same dtype


# numbers


def numbers(options: argparse.Namespace) -> Iterator[Case]:
    T, sizes = (40, (16, 80)) if options.interpret else (700, (64, 80, 96, 128, 256))
    for dtype in (torch.bfloat16, torch.float16):
        short = str(dtype).removeprefix("torch.")
        for D in sizes:
            yield f"causal d{D} {short}", partial(attention_error, AttentionMask(causal=True), {}, T, D, dtype)
        for name, mask in masks(T, options.device).items():
            yield f"{name} d{sizes[0]} {short}", partial(attention_error, mask, {}, T, sizes[0], dtype)
        for name, scores in score_options(options.device).items():
            mask = AttentionMask(causal=True)
            yield f"{name} d{sizes[0]} {short}", partial(attention_error, mask, scores, T, sizes[0], dtype)
    S = 200 if options.interpret else 32768
    mask = AttentionMask(causal=True)
    yield f"causal, 64 queries of {S} keys", partial(attention_error, mask, {}, 64, sizes[0], torch.bfloat16, S)
    yield "linear cross entropy bfloat16", partial(cross_entropy_error, options)


def masks(T: int, device: str) -> dict[str, AttentionMask]:
    """One mask of each kind, for two rows."""
    segments = torch.tensor([[1] * (T // 2) + [2] * (T - T // 2 - 3) + [0] * 3, [1] * 5 + [2] * (T - 5)], device=device)
    ranks = torch.randperm(T, generator=torch.Generator().manual_seed(0)).expand(2, T).to(device)
    return {
        "all": AttentionMask(),
        "window": AttentionMask(causal=True, window=T // 5),
        "packed": AttentionMask(causal=True, segments=segments),
        "padded": AttentionMask(segments=segments.clamp(max=1)),
        "prefix": AttentionMask(causal=True, prefix=T // 3),
        "order": AttentionMask(order=ranks, strict=True),
        "shared keys": AttentionMask(causal=True, global_prefix=4, segments=segments),
    }


def score_options(device: str) -> dict[str, dict[str, object]]:
    per_head = torch.tensor([0.5, 0.125, 0.03, 0.01], device=device)
    return {"softcap": {"softcap": 5.0}, "alibi": {"alibi": per_head}, "sinks": {"sinks": per_head * 4}}


def attention_error(
    mask: AttentionMask, scores: dict, T: int, D: int, dtype: torch.dtype, S: int | None = None
) -> Figures:
    """Largest relative error of output and gradients, (B, H, T, D) = (2, 4, T, D) with two key heads, beside eager code's."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, T, 4, D), (2, S or T, 2, D), (2, S or T, 2, D), (2, T, 4, D))
    drawn = [torch.randn(shape, generator=generator).to(device, dtype).transpose(1, 2) for shape in shapes]

    def results(backend: str, kind: torch.dtype) -> list[Tensor]:
        q, k, v, d_o = (x.to(kind).detach() for x in drawn)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        made = {name: x.to(kind) if isinstance(x, Tensor) else x for name, x in scores.items()}
        o = attention_with(q, k, v, mask, ScoreOptions(**made), backend=backend)
        return [o.detach(), *torch.autograd.grad(o, leaves, d_o)]

    exact = results("reference", torch.float64)
    return judged(results("triton", dtype), results("reference", dtype), exact)


def cross_entropy_error(options: argparse.Namespace) -> Figures:
    N, C, V = (33, 16, 120) if options.interpret else (2048, 1024, 50257)
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, C, generator=generator).to(options.device) for n in (N, V))
    labels = torch.randint(V, (N,), generator=generator).to(options.device)

    def results(loss: Callable, kind: torch.dtype) -> list[Tensor]:
        leaves = [x.bfloat16().to(kind).detach().requires_grad_() for x in (hidden, 0.02 * weight)]
        value = loss(*leaves, labels)
        return [value.detach(), *torch.autograd.grad(value, leaves)]

    def double(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(hidden @ weight.t(), labels, reduction="sum")

    exact = results(double, torch.float64)
    return judged(results(linear_cross_entropy, torch.bfloat16), results(full_logits, torch.bfloat16), exact)


def judged(ours: list[Tensor], eager: list[Tensor], exact: list[Tensor]) -> Figures:
    def error(results: list[Tensor]) -> float:
        pairs = zip(results, exact, strict=True)
        return max(((a.double() - b).norm() / b.norm().clamp_min(1e-30)).item() for a, b in pairs)

    error_of_ours, error_of_eager = error(ours), error(eager)
    right = error_of_ours <= ALLOWED * error_of_eager + 1e-7  # False for NaN
    return {"error": error_of_ours, "eager": error_of_eager, "right": right}


# times


def attention_times(options: argparse.Namespace) -> Iterator[Case]:
    shapes = [(40, 16)] if options.interpret else [(T, D) for D in (64, 128) for T in (1024, 4096, 16384)]
    for T, D in shapes:
        B = 1 if options.interpret else max(1, TOKENS // T)
        kinds = {"causal": AttentionMask(causal=True)}
        kinds["packed"] = AttentionMask(causal=True, segments=segments_of(B, T, options.device))
        for name, mask in kinds.items():
            peers = {"triton": partial(attention, mask=mask, backend="triton")}
            if not options.interpret:
                peers = attends(mask, B, T) | (sdpa_backends() if name == "causal" else {"varlen": varlen(B, T)})
            for peer, attend in peers.items():
                yield f"{name} T{T} d{D} {peer}", partial(attention_time, options, attend, name, B, T, D)


def attention_time(options: argparse.Namespace, attend: Callable, name: str, B: int, T: int, D: int) -> Figures:
    if options.interpret:
        q = torch.randn(B, 4, T, D)
        return {"runs": attend(q, q, q).shape == q.shape}
    figures = attention_figures(attend, name=name, B=B, T=T, D=D, options=options)
    return dict(zip(("forward_ms", "forward_tflops", "backward_ms", "backward_tflops", "mib"), figures, strict=True))


def sdpa_backends() -> dict[str, Callable]:
    def one(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])

    kinds = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
    return {f"sdpa {kind.name.split('_')[0].lower()}": partial(one, kind) for kind in kinds}


def varlen(B: int, T: int) -> Callable:
    """torch's attention of packed rows, for the documents of `segments_of`."""
    from torch.nn.attention.varlen import varlen_attn

    segments = segments_of(B, T)
    begins = torch.ones_like(segments, dtype=torch.bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    starts = torch.cat([begins.flatten().nonzero().flatten(), torch.tensor([B * T], device=segments.device)])
    longest, starts = int(starts.diff().max()), starts.int().cuda()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        flat = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]
        o = varlen_attn(*flat, starts, starts, longest, longest, window_size=(-1, 0))
        return o.unflatten(0, (B, T)).transpose(1, 2)

    return attend


def cross_entropy_times(options: argparse.Namespace) -> Iterator[Case]:
    N, C, sizes = (33, 16, [120]) if options.interpret else (8192, 2048, [50257, 128256])
    losses = {"ours": linear_cross_entropy, "full logits": full_logits}
    if not options.interpret:
        losses["compiled"] = torch.compile(full_logits)
    for V in sizes:
        for name, loss in losses.items():
            yield f"V{V} {name}", partial(cross_entropy_time, options, loss, N, C, V)


def cross_entropy_time(options: argparse.Namespace, loss: Callable, N: int, C: int, V: int) -> Figures:
    hidden = torch.randn(N, C, dtype=torch.bfloat16, device=options.device).requires_grad_()
    weight = (0.02 * torch.randn(V, C, device=options.device)).bfloat16().requires_grad_()
    labels = torch.randint(V, (N,), device=options.device)

    def step() -> None:
        torch.autograd.grad(loss(hidden, weight, labels), (hidden, weight))

    if options.interpret:
        step()
        return {"runs": True}
    time = milliseconds(step, options.repeats)
    return {"ms": time, "tflops": 6 * N * V * C / time / 1e9, "mib": peak_mib(step)}


# commands


def training(options: argparse.Namespace) -> Iterator[Case]:
    models = ["gpt_nano"] if options.interpret else ["gpt", "llama_1b"]
    for model in models:
        for compiled in (False,) if options.interpret else (False, True):
            yield f"{model}{' compiled' * compiled}", partial(training_rate, options, model, compiled)


def training_rate(options: argparse.Namespace, model: str, compiled: bool) -> Figures:
    """The last logged figures of a run of a few steps on the shipped text."""
    steps = 2 if options.interpret else 30
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "train.py"), f"model={model}", f"output_dir={folder}/run", "logger=csv"]
        command += [
            f"trainer.max_steps={steps}",
            f"trainer.log_every_n_steps={steps // 2}",
            f"compile={str(compiled).lower()}",
        ]
        command += ["trainer.limit_val_batches=0", "callbacks.samples.every_n_steps=null", "callbacks.export=false"]
        command += [] if options.interpret else ["precision=bf16"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=options.minutes * 60)
        if done.returncode:
            raise RuntimeError((done.stderr or done.stdout).strip().splitlines()[-1])
        with Path(folder, "run", "metrics.csv").open() as file:
            row = [row for row in csv.DictReader(file) if row["train/tokens_per_sec"]][-1]
    names = ("loss", "tokens_per_sec", "mfu", "memory_gib")
    figures = {name: float(row[f"train/{name}"]) for name in names if row.get(f"train/{name}")}
    return {"runs": figures["loss"] > 0} if options.interpret else figures


def decoding(options: argparse.Namespace) -> Iterator[Case]:
    for rows in (1, 2) if options.interpret else (1, 16):
        yield f"{rows} rows", partial(decoding_rate, options, rows)


def decoding_rate(options: argparse.Namespace, rows: int) -> Figures:
    """Tokens per second after a prompt of 64, and the share of the bandwidth limit: weights read once a step."""
    from genai_pl.config.generation import GenerationConfig
    from genai_pl.generation import generate
    from genai_pl.models import ModelConfig, build_model

    llama = {"position": "rotary", "norm": "rmsnorm", "gated_mlp": True, "activation": "silu", "bias": False}
    sizes = {"n_layer": 22, "n_head": 32, "n_kv_head": 4, "n_embd": 2048, "vocab_size": 32000, "max_seq_len": 2048}
    if options.interpret:
        sizes = {"n_layer": 1, "n_head": 2, "n_kv_head": 1, "n_embd": 32, "vocab_size": 99, "max_seq_len": 128}
    torch.manual_seed(0)
    kind = torch.float32 if options.interpret else torch.bfloat16
    model = build_model(ModelConfig(**sizes, **llama)).to(options.device, kind).eval()
    ids, n = torch.randint(99, (rows, 64), device=options.device), 4 if options.interpret else 128
    with torch.inference_mode():
        run = partial(generate, model, ids, GenerationConfig(max_new_tokens=n, temperature=0.0))
        written = run()
        if options.interpret:
            return {"runs": written.shape[0] == rows}
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
    return {"tokens_per_sec": rows * n / (time.perf_counter() - start)}


STAGES = {
    "numbers": numbers,
    "attention": attention_times,
    "cross_entropy": cross_entropy_times,
    "training": training,
    "decoding": decoding,
}


def machine(options: argparse.Namespace) -> Figures:
    import triton

    name = platform.processor() or platform.machine()
    versions = {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__}
    return {"device": name if options.interpret else torch.cuda.get_device_name(), **versions}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=", ".join(STAGES))
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--interpret", action="store_true")
    options = parser.parse_args()
    unknown = sorted(set(options.stages) - set(STAGES))
    if unknown:
        parser.error(f"no stage {', '.join(unknown)}: choose of {', '.join(STAGES)}")
    if not options.interpret and not torch.cuda.is_available():
        parser.error("torch sees no GPU: --interpret runs the same stages on tiny shapes without one")
    options.device = "cpu" if options.interpret else "cuda"
    options.repeats, options.heads, options.kv_heads = 10, 16, None
    sys.exit(run_stages(options))


def run_stages(options: argparse.Namespace) -> int:
    """Run all cases until the time is up; 0, or 1 if numbers were wrong or a case failed."""
    begin, report, failed = time.monotonic(), {"machine": machine(options)}, 0
    for stage in options.stages or STAGES:
        report[stage] = {}
        for name, measure in STAGES[stage](options):
            if time.monotonic() - begin > options.minutes * 60:
                figures = {"left out": "the time was up"}
            else:
                try:
                    figures = measure()
                except Exception as error:  # the next case may still run
                    figures = {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}
            failed += "failed" in figures or figures.get("right", figures.get("runs")) is False
            report[stage][name] = figures
            shown = "  ".join(
                f"{key} {value:.4g}" if type(value) is float else f"{key} {value}" for key, value in figures.items()
            )
            print(f"{stage:13s} {name:36s} {shown}", flush=True)
            options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"{time.monotonic() - begin:.0f} s, {failed} wrong or failed; all figures are in {options.out}")
    return int(failed > 0)


if __name__ == "__main__":
    main()
