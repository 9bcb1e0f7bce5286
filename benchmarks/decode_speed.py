"""Decoding speed of a Hugging Face folder against transformers: python benchmarks/decode_speed.py FOLDER [--dtype int8]

All sides continue the same `--prompt` random tokens by `--tokens` greedy ones, at each of `--batch-size`, in turns in one
process, `--pairs` times; reading the prompt counts. Sides are ours in each `--dtype` (of the weights) and transformers in each of
`--transformers`; ratios are to its first. Seconds are of the process on the CPU with `--threads` (1), which other work on
the machine disturbs less than the clock's; `--clock` takes the clock, as more threads need it. `--onnx FOLDER ...` adds
what export.py format=onnx wrote, run by our loop, and `--gguf FILE` adds llama.cpp, if llama-cpp-python is installed.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from genai_pl.config.generation import GenerationConfig
from genai_pl.generation import generate
from genai_pl.loading import load
from genai_pl.models import prepare_for_decoding

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8, "int4": torch.int4}
Side = Callable[[Tensor], Tensor]  # a prompt (B, T) to prompt and continuation (B, T + n)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=list(DTYPES))
    parser.add_argument("--transformers", choices=["fp32", "bf16"], nargs="+", default=["fp32"])
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", action="store_true")
    parser.add_argument("--onnx", type=Path, nargs="+", default=[])
    parser.add_argument("--gguf", type=Path)
    return parser.parse_args()


def ours(folder: Path, dtype: torch.dtype, n: int, rows: int) -> Side:
    model = load(str(folder), dtype=dtype, rows=rows).model
    prepare_for_decoding(model, rows=rows)
    return decoding(model, n)


def decoding(model: torch.nn.Module, n: int) -> Side:
    return partial(generate, model, config=GenerationConfig(max_new_tokens=n, temperature=0.0))


def transformers(folder: Path, dtype: torch.dtype, n: int) -> Side:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    return lambda ids: model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, min_new_tokens=n, do_sample=False
    )


def llama_cpp(file: Path, n: int, threads: int) -> Side:
    from llama_cpp import Llama

    model = Llama(str(file), n_ctx=4096, n_threads=threads, n_threads_batch=threads, verbose=False)

    def continued(input_ids: Tensor) -> Tensor:
        rows = []
        for row in input_ids.tolist():
            model.reset()
            steps = model.generate(row, temp=0.0)
            rows.append(row + [next(steps) for _ in range(n)])
        return torch.tensor(rows)

    return continued


def sides(args: argparse.Namespace, rows: int) -> dict[str, Side]:
    n = args.tokens
    found = {f"transformers {name}": transformers(args.folder, DTYPES[name], n) for name in args.transformers}
    found |= {f"ours {name}": ours(args.folder, DTYPES[name], n, rows) for name in args.dtype}
    for number, folder in enumerate(args.onnx):
        found[f"onnx {number + 1}"] = decoding(load(str(folder), onnx=True).model, n)
    if args.gguf:
        found["llama.cpp"] = llama_cpp(args.gguf, n, args.threads)
    return found


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    now = time.perf_counter if args.clock else time.process_time
    with torch.inference_mode():
        for batch_size in args.batch_size:
            measure(sides(args, batch_size), args, batch_size, now)


def measure(made: dict[str, Side], args: argparse.Namespace, batch_size: int, now: Callable[[], float]) -> None:
    """Print the median of each side, of its ratio to the first in the same turn, and how many tokens of both are the same."""
    input_ids = torch.randint(0, 1000, (batch_size, args.prompt), generator=torch.Generator().manual_seed(0))
    rates: dict[str, list[float]] = {side: [] for side in made}
    texts = {}
    for _ in range(args.pairs):
        for side, run in made.items():
            start = now()
            texts[side] = run(input_ids)[:, args.prompt :]
            rates[side].append(batch_size * args.tokens / (now() - start))
    first = next(iter(made))
    print(f"batch {batch_size}, {args.threads} threads, ratios to {first}")
    for side, of_side in rates.items():
        ratio = statistics.median(x / y for x, y in zip(of_side, rates[first], strict=True))
        same = (texts[side] == texts[first]).float().mean()
        print(
            f"  {side:<18}{statistics.median(of_side):9,.1f} tokens/s  {ratio:5.2f} times  {same:4.0%} of its tokens",
            flush=True,
        )


if __name__ == "__main__":
    main()
