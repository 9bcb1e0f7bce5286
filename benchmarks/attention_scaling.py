"""Time and memory of the attention kinds over the length: python benchmarks/attention_scaling.py [--plot FILE.png]

One forward and backward pass over one row of random numbers, float32, each measurement in a process of its own. Time
is the fastest of `--repeats` after one to warm up; memory is how far the process grew at its peak beyond what it held
before (on a GPU, what was allocated at the peak). Linformer has no causal form and stays out with --causal.
"""

import argparse
import json
import resource
import subprocess
import sys
import time

KINDS = ("full", "window", "linformer", "performer", "reformer")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--min-length", type=int, default=256)
    parser.add_argument("--max-length", type=int, default=8192)
    parser.add_argument("--n-head", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--plot", metavar="FILE.png", help="draw both curves (needs matplotlib)")
    parser.add_argument("--measure", nargs=2, metavar=("KIND", "LENGTH"), help=argparse.SUPPRESS)
    return parser.parse_args()


def build(kind: str, length: int, args: argparse.Namespace):
    """The kind at the sizes that a model has unless told otherwise; window as wide as Reformer's buckets reach."""
    from functools import partial

    from genai_pl.kernels import attention
    from genai_pl.kernels.efficient import Linformer, Performer, Reformer, WindowAttention

    makers = {
        "full": lambda: partial(attention, backend="auto"),
        "window": lambda: WindowAttention(window=64, n_global=1, backend="auto"),
        "linformer": lambda: Linformer(max_seq_len=length, rank=64, n_kv_head=args.n_head).to(args.device),
        "performer": lambda: Performer(head_dim=args.head_dim, n_features=128, seed=0).to(args.device),
        "reformer": lambda: Reformer(n_hashes=2, bucket_size=64, seed=0),
    }
    return makers[kind]()


def measure(kind: str, length: int, args: argparse.Namespace) -> dict[str, float]:
    """Seconds and MiB of this process."""
    import torch

    from genai_pl.kernels import AttentionMask

    on_gpu = torch.device(args.device).type == "cuda"
    attend = build(kind, length, args)
    size = (1, args.n_head, length, args.head_dim)
    q, k, v = (torch.randn(size, device=args.device, requires_grad=True) for _ in range(3))

    def step() -> float:
        start = time.perf_counter()
        attend(q, k, v, AttentionMask(causal=args.causal)).sum().backward()
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def peak() -> float:
        if on_gpu:
            return torch.cuda.max_memory_allocated() / 2**20
        unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20

    before = peak()
    step()
    return {"memory": peak() - before, "seconds": min(step() for _ in range(args.repeats))}


def in_a_process(kind: str, length: int) -> dict[str, float]:
    command = [sys.executable, __file__, *sys.argv[1:], "--measure", kind, str(length)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip() or "killed").splitlines()[-1]
        sys.exit(f"error: {kind} at {length} tokens failed: {last}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def draw(results: dict[str, dict[int, dict[str, float]]], path: str) -> None:
    """Both curves, on axes where a power of the length is a straight line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for axis, name, label in zip(axes, ("seconds", "memory"), ("seconds", "peak memory, MiB"), strict=True):
        for kind, points in results.items():
            axis.plot(list(points), [max(x[name], 1e-3) for x in points.values()], marker="o", label=kind)
        lengths = list(next(iter(results.values())))
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(lengths, [str(length) for length in lengths])
        axis.set(xlabel="tokens", ylabel=label, title=f"forward and backward: {label}")
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=150)
    print(f"wrote {path}")


def main() -> None:
    args = parse()
    if args.measure:
        print(json.dumps(measure(args.measure[0], int(args.measure[1]), args)))
        return
    kinds = [kind for kind in args.kinds if not (args.causal and kind == "linformer")]
    lengths = [args.min_length]
    while lengths[-1] * 2 <= args.max_length:
        lengths.append(lengths[-1] * 2)
    print(f"{args.n_head} heads of {args.head_dim}, {'causal' if args.causal else 'bidirectional'}, {args.device}")
    print(f"{'tokens':>6}" + "".join(f"{kind:>20}" for kind in kinds))
    results: dict[str, dict[int, dict[str, float]]] = {kind: {} for kind in kinds}
    for length in lengths:
        row = f"{length:6}"
        for kind in kinds:
            result = results[kind][length] = in_a_process(kind, length)
            row += f"{1000 * result['seconds']:9.0f} ms{result['memory']:5.0f} MiB"
        print(row, flush=True)
    if args.plot:
        draw(results, args.plot)


if __name__ == "__main__":
    main()
