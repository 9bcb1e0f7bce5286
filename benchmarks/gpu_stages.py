"""Stages of `gpu.py`: cases by name, each a function that measures something and returns figures.

A case that compares numbers has `right`, one that only shows that code runs has `runs`; the rest are what was measured.
"""

import argparse
import csv
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from kernels import TOKENS, attention_figures, flex, full_logits, milliseconds, peak_mib, segments_of
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from genai_pl.kernels import AttentionMask, ScoreOptions, attention, attention_with, linear_cross_entropy
from genai_pl.kernels.attention_probe import ProbeShape, candidates_for, choose, gpu_clock

ROOT = Path(__file__).parent.parent

Figures = dict[str, Any]
Case = tuple[str, Callable[[], Figures]]  # a name, and what measures it
ALLOWED = 2.0  # times the error of eager code in the same dtype


# the choice of a run


def probe(options: argparse.Namespace) -> Iterator[Case]:
    """What `model.attention=auto` becomes, and whether every candidate is right."""
    shapes = {"gpt": (12, 12, 64), "llama_1b": (32, 8, 64), "llama_7b": (32, 32, 128)}
    shapes = {"tiny": (2, 1, 16)} if options.interpret else shapes
    for name, (H, K, D) in shapes.items():
        shape = ProbeShape(H, K, D, torch.float32 if options.interpret else torch.bfloat16, length=options.probe_length)
        yield name, partial(probe_choice, options, shape)


def probe_choice(options: argparse.Namespace, shape: ProbeShape) -> Figures:
    device = torch.device(options.device)
    clock = (lambda step: 1.0) if options.interpret else gpu_clock
    choice = choose(shape, device, clock=clock, attends=candidates_for(shape, device))
    chosen = {} if options.interpret else {"choice": choice.lines()[0]}
    return {**chosen, "left_out": choice.left_out, "right": not choice.left_out}


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
    # what compiles longest is last
    for peer in ("triton",) if options.interpret else ("triton", "sdpa", "varlen", *SDPA_KINDS, "flex"):
        for T, D in shapes:
            for name in ("causal", "packed"):
                if name == "causal" or peer not in SDPA_KINDS:
                    yield f"{name} T{T} d{D} {peer}", partial(attention_time, options, peer, name, T, D)


def attention_time(options: argparse.Namespace, peer: str, name: str, T: int, D: int) -> Figures:
    B = 1 if options.interpret else max(1, TOKENS // T)
    segments = segments_of(B, T, options.device) if name == "packed" else None
    mask = AttentionMask(causal=True, segments=segments)
    if peer in SDPA_KINDS:
        attend = partial(one_kind_of_sdpa, SDPA_KINDS[peer])
    elif peer == "flex":
        attend = flex(mask, B, T)
    else:
        attend = partial(attention, mask=mask, backend=peer)
    if options.interpret:
        q = torch.randn(B, 4, T, D)
        return {"runs": attend(q, q, q).shape == q.shape}
    figures = attention_figures(attend, name=name, B=B, T=T, D=D, options=options)
    return dict(zip(("forward_ms", "forward_tflops", "backward_ms", "backward_tflops", "mib"), figures, strict=True))


SDPA_KINDS = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def one_kind_of_sdpa(kind: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(kind):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


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


TINY_RUN = ["tokenizer=byte", "model.n_layer=1", "model.max_seq_len=32", "data.batch_size=2"]


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
        command += TINY_RUN if options.interpret else ["precision=bf16"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=options.end - time.monotonic())
        if done.returncode:
            raise RuntimeError((done.stderr or done.stdout).strip().splitlines()[-1])
        with Path(folder, "run", "metrics.csv").open() as file:
            row = [row for row in csv.DictReader(file) if row["train/tokens_per_sec"]][-1]
    names = ("loss", "tokens_per_sec", "mfu", "memory_gib")
    figures = {name: float(row[f"train/{name}"]) for name in names if row.get(f"train/{name}")}
    return {"runs": figures["loss"] > 0} if options.interpret else figures


def decoding(options: argparse.Namespace) -> Iterator[Case]:
    for rows in (1, 2) if options.interpret else (1, 16):
        for graphs in (False,) if options.interpret else (True, False):
            yield f"{rows} rows{' without graphs' * (not graphs)}", partial(decoding_rate, options, rows, graphs)


def decoding_rate(options: argparse.Namespace, rows: int, graphs: bool) -> Figures:
    """Tokens per second after a prompt of 64; graphs: CUDA graphs, where they are faster."""
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
        run = partial(generate, model, ids, GenerationConfig(max_new_tokens=n, temperature=0.0, cuda_graphs=graphs))
        written = run()
        if options.interpret:
            return {"runs": written.shape[0] == rows}
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
    return {"tokens_per_sec": rows * n / (time.perf_counter() - start)}


STAGES = {
    "probe": probe,
    "numbers": numbers,
    "attention": attention_times,
    "cross_entropy": cross_entropy_times,
    "training": training,
    "decoding": decoding,
}
