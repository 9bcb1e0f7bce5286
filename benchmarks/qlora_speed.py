"""QLoRA beside LoRA: python benchmarks/qlora_speed.py MODEL compares a base in 4 and 8 bits with one in float32.

One process, float32, all in turns: seconds of a token (greedy, one row, adapter and all), and of a training step (forward,
loss, backward; no optimizer) of 2 rows of 128 tokens. The best of the turns counts, since other work only adds time.
MODEL: a folder of a family of ours.
"""

import argparse
import gc
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genai_pl.config.generation import GenerationConfig
from genai_pl.generation import generate
from genai_pl.models import load_pretrained
from genai_pl.peft import lora

KINDS = (None, "nf4", "int8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=16, help="that are decoded in a turn")
    return parser.parse_args()


def seconds_of_token(model: nn.Module, prompt: Tensor, n: int) -> float:
    """Seconds of each token beyond the first."""
    times = []
    for tokens in (1, 1 + n):
        start = time.perf_counter()
        generate(model, prompt, GenerationConfig(max_new_tokens=tokens, temperature=0.0))
        times.append(time.perf_counter() - start)
    return (times[1] - times[0]) / n


def seconds_of_step(model: nn.Module, ids: Tensor) -> float:
    """Seconds of a forward and a backward pass."""
    start = time.perf_counter()
    F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    return time.perf_counter() - start


def main() -> None:
    args = parse()
    models = {kind: lora(load_pretrained(args.model), quantize=kind).eval() for kind in KINDS}
    gc.collect()
    ids = torch.randint(3, 1000, (2, 128), generator=torch.Generator().manual_seed(0))
    print(f"{'threads':<9}{'base':<7}{'token, ms':>11}{'over fp32':>11}{'step, s':>9}{'over fp32':>11}")
    for threads in args.threads:
        torch.set_num_threads(threads)
        best: dict[str | None, tuple[float, float]] = {}
        for _ in range(args.turns):
            for kind, model in models.items():
                found = seconds_of_token(model, ids[:1, :16], args.tokens), seconds_of_step(model, ids)
                best[kind] = tuple(map(min, found, best.get(kind, found)))
        for kind, (token, step) in best.items():
            over = [now / then for now, then in zip((token, step), best[None], strict=True)]
            print(
                f"{threads:<9}{kind or 'fp32':<7}{token * 1e3:>11.1f}{over[0]:>11.2f}{step:>9.2f}{over[1]:>11.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
