"""Peak memory above the inputs, and time, of the loss of a big vocabulary: `python benchmarks/cross_entropy.py`.

Every variant runs in a process of its own, so that none inherits the heap of another. Linux only (/proc).
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from genai_pl.kernels import linear_cross_entropy, linear_logprobs

V, C = 50257, 768
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def full(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy((hidden @ weight.t()).float(), labels, reduction="sum")


def logprobs(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return -linear_logprobs(hidden, weight, labels).sum()


LOSSES: dict[str, Loss] = {"full logits": full, "ours": linear_cross_entropy, "ours, logprobs": logprobs}


def memory_mib(field: str) -> float:
    """A line of /proc/self/status: VmRSS is now, VmHWM is the highest since the last reset."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[field].split()[0]) / 1024


def measure(
    loss: Loss, *, tokens: int, dtype: torch.dtype, ignored: float, autocast: bool, frozen: bool
) -> tuple[float, float]:
    """Peak MiB above the inputs and seconds of one forward and backward pass."""
    torch.manual_seed(0)
    hidden = torch.randn(tokens, C).to(dtype).requires_grad_()
    weight = (0.02 * torch.randn(V, C)).to(dtype).requires_grad_(not frozen)
    labels = torch.randint(V, (tokens,)).masked_fill(torch.rand(tokens) < ignored, -100)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss(hidden[:2], weight[:9].detach(), labels[:2].clamp(0, 8)).backward()  # starts the thread pools
        hidden.grad = None
        Path("/proc/self/clear_refs").write_text("5")
        before, start = memory_mib("VmRSS"), time.perf_counter()
        value = loss(hidden, weight, labels) / tokens
    value.backward()
    return memory_mib("VmHWM") - before, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=LOSSES, help="measure this variant in this process")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--ignored", type=float, default=0.0, help="share of tokens without a label")
    parser.add_argument("--autocast", action="store_true", help="bfloat16 products")
    parser.add_argument("--frozen", action="store_true", help="the weight needs no gradient, as under LoRA")
    options = parser.parse_args()
    if options.only is None:
        print(
            f"{options.tokens} tokens, {V} words, {C} channels, {torch.get_num_threads()} threads; forward and backward"
        )
        for name in LOSSES:
            subprocess.run([sys.executable, __file__, *sys.argv[1:], "--only", name], check=True)
        return
    peak, seconds = measure(
        LOSSES[options.only],
        tokens=options.tokens,
        dtype=getattr(torch, options.dtype),
        ignored=options.ignored,
        autocast=options.autocast,
        frozen=options.frozen,
    )
    print(f"{options.only:16s} {peak:6.0f} MiB above the inputs {seconds:6.1f} s", flush=True)


if __name__ == "__main__":
    main()
