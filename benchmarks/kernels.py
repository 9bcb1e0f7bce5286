"""Time, memory and TFLOP/s of the kernels on a GPU: `python benchmarks/kernels.py [attention] [cross_entropy]`.

Attention beside SDPA and flex attention, forward and backward; linear cross entropy beside full logits.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from genai_pl.kernels import AttentionMask, attention, linear_cross_entropy

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
TOKENS = 16384  # in a batch, whatever its length: the same work for every layer but attention


def milliseconds(run: Callable[[], object], repeats: int) -> float:
    """The median time of a call; a buffer larger than the cache is written in between."""
    for _ in range(3):
        run()
    cache = torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in pairs:
        cache.zero_()
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    times = sorted(start.elapsed_time(end) for start, end in pairs)
    return times[len(times) // 2]


def peak_mib(run: Callable[[], object]) -> float:
    """What a call takes beyond what is allocated already."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def segments_of(B: int, T: int, device: str = "cuda") -> Tensor:
    """Eight documents of one length in every row."""
    return (torch.arange(T, device=device) // max(1, T // 8) + 1).expand(B, T)


def flex(mask: AttentionMask, B: int, T: int) -> Attend:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        causal = i >= j
        return causal if mask.segments is None else causal & (mask.segments[b, i] == mask.segments[b, j])

    torch.compiler.reset()  # else it gives up compiling after eight shapes, and runs T^2 in eager mode
    rows = None if mask.segments is None else B
    block_mask = create_block_mask(visible, B=rows, H=None, Q_LEN=T, KV_LEN=T, device="cuda")
    return partial(torch.compile(flex_attention, dynamic=False), block_mask=block_mask, enable_gqa=True)


def attends(mask: AttentionMask, B: int, T: int) -> dict[str, Attend]:
    return {
        "triton": partial(attention, mask=mask, backend="triton"),
        "sdpa": partial(attention, mask=mask, backend="sdpa"),
        "flex": flex(mask, B, T),
    }


def bench_attention(options: argparse.Namespace) -> None:
    """One line per mask, head dimension, length and implementation."""
    print(
        f"{'mask':7s} {'D':>4s} {'T':>6s} {'':8s} {'fwd ms':>8s} {'TFLOP/s':>8s} {'bwd ms':>8s} {'TFLOP/s':>8s} {'MiB':>7s}"
    )
    for D in options.head_dim:
        for T in options.length:
            B = max(1, TOKENS // T)
            for name, mask in (
                ("causal", AttentionMask(causal=True)),
                ("packed", AttentionMask(causal=True, segments=segments_of(B, T))),
            ):
                for kind, attend in attends(mask, B, T).items():
                    line = attention_line(attend, name=name, B=B, T=T, D=D, options=options)
                    print(f"{name:7s} {D:4d} {T:6d} {kind:8s} {line}", flush=True)


def backward_milliseconds(attend: Attend, leaves: list[Tensor], d_o: Tensor, repeats: int) -> float:
    o = attend(*leaves)
    return milliseconds(lambda: torch.autograd.grad(o, leaves, d_o, retain_graph=True), repeats)


def attention_line(attend: Attend, *, name: str, B: int, T: int, D: int, options: argparse.Namespace) -> str:
    figures = attention_figures(attend, name=name, B=B, T=T, D=D, options=options)
    return "{:8.3f} {:8.1f} {:8.3f} {:8.1f} {:7.0f}".format(*figures)


def attention_figures(
    attend: Attend, *, name: str, B: int, T: int, D: int, options: argparse.Namespace
) -> tuple[float, float, float, float, float]:
    """Milliseconds and TFLOP/s forward and backward, and MiB of both beyond the inputs."""
    H, K = options.heads, options.kv_heads or options.heads
    shapes = ((H, D), (K, D), (K, D), (H, D))
    q, k, v, d_o = (
        torch.randn(B, T, heads, D, dtype=torch.bfloat16, device="cuda").transpose(1, 2) for heads, D in shapes
    )
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def step() -> None:
        torch.autograd.grad(attend(q, k, v), leaves, d_o)

    with torch.no_grad():
        forward = milliseconds(lambda: attend(q, k, v), options.repeats)
    backward = backward_milliseconds(attend, leaves, d_o, options.repeats)
    # two products forward and five backward, over the half of the scores that causal attention sees
    flops = 2 * B * H * T * T * D * (1 / 8 if name == "packed" else 1)
    return forward, flops / forward / 1e9, backward, 2.5 * flops / backward / 1e9, peak_mib(step)


def full_logits(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy((hidden @ weight.t()).float(), labels, reduction="sum")


def bench_cross_entropy(options: argparse.Namespace) -> None:
    """One line per vocabulary and implementation, forward and backward."""
    N, C = options.tokens, options.channels
    print(f"{'V':>7s} {'':12s} {'ms':>8s} {'TFLOP/s':>8s} {'MiB':>7s}   {N} tokens, {C} channels, bf16")
    for V in options.vocab:
        hidden = torch.randn(N, C, dtype=torch.bfloat16, device="cuda").requires_grad_()
        weight = (0.02 * torch.randn(V, C, device="cuda")).bfloat16().requires_grad_()
        labels = torch.randint(V, (N,), device="cuda")
        losses = {"ours": linear_cross_entropy, "full logits": full_logits, "compiled": torch.compile(full_logits)}
        for name, loss in losses.items():

            def step(loss=loss, inputs=(hidden, weight, labels)) -> None:
                torch.autograd.grad(loss(*inputs), inputs[:2])

            time = milliseconds(step, options.repeats)
            print(f"{V:7d} {name:12s} {time:8.2f} {6 * N * V * C / time / 1e9:8.1f} {peak_mib(step):7.0f}", flush=True)


BENCHMARKS = {"attention": bench_attention, "cross_entropy": bench_cross_entropy}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", help=f"{' or '.join(BENCHMARKS)}; both by default")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--length", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--head-dim", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, help="fewer than --heads for grouped queries")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--channels", type=int, default=2048)
    parser.add_argument("--vocab", type=int, nargs="+", default=[50257, 128256])
    options = parser.parse_args()
    chosen = options.what or list(BENCHMARKS)
    if unknown := [name for name in chosen if name not in BENCHMARKS]:
        parser.error(f"{unknown[0]} is not a benchmark: choose {' or '.join(BENCHMARKS)}")
    if not torch.cuda.is_available():
        print("no GPU here: nothing to measure (kernels_static.py reports what the compilers make of the kernels)")
        return
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    for name in chosen:
        BENCHMARKS[name](options)


if __name__ == "__main__":
    main()
