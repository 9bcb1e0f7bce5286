"""Quality of bits: python benchmarks/compare_bits.py MODEL TEXT OTHER ... compares OTHERs with MODEL on a text.

MODEL and OTHERs are any references (folders, runs, GGUF files) of models with one tokenizer; TEXT is a file. An OTHER may also
be bf16, f16, int8 or int4 (MODEL loaded so, `dtype=`), or nf4 (its blocks as `peft.quantize=nf4` holds them). Printed are
perplexity, the mean Kullback-Leibler divergence KL(MODEL || OTHER) of the next token in nats, how often both have the same
likeliest token, and the size of the weights on disk. All compute in float32 with the weights as they are stored.
"""

import argparse
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from genai_pl.loading import load
from genai_pl.models import Model
from genai_pl.models.packed_linear import bytes_when_packed
from genai_pl.peft.quantize import Quantized, quantize


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("others", nargs="*")
    parser.add_argument("--tokens", type=int, default=16384, help="of the text, from its beginning")
    parser.add_argument("--window", type=int, default=512, help="tokens that are read at once")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    base = load(args.model)
    ids = base.tokenizer(args.text.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"][: args.tokens]
    windows = torch.tensor(ids[: len(ids) // args.window * args.window]).view(-1, args.window)
    print(f"{'model':<28}{'MiB':>8}{'perplexity':>12}{'KL':>10}{'same':>8}  on {windows[:, 1:].numel():,} tokens")
    expected = [x.float() for x in log_probabilities(base.model, windows)]
    for name in (args.model, *args.others):
        if name in KINDS:
            model, size = KINDS[name](args.model)
        else:
            loaded = base if name == args.model else load(name)
            model, size = loaded.model, size_of(loaded.path)
        report(name, size, model, windows, expected)


def rounded(reference: str, dtype: torch.dtype) -> tuple[Model, int]:
    """The model with weights rounded to 16 bits, computing in float32, and their bytes."""
    model = load(reference, dtype=dtype).model
    return model.float(), 2 * sum(weight.numel() for weight in model.parameters())


def packed(reference: str, dtype: torch.dtype) -> tuple[Model, int]:
    """The model as `dtype=int8` or `int4` decodes with it, and the bytes of its matrices."""
    size = bytes_when_packed(load(reference).model, dtype)
    return load(reference, dtype=dtype).model, size


def nf4(reference: str) -> tuple[Model, int]:
    """The model on a base of nf4, and its bytes with all else in float32."""
    model = quantize(load(reference).model, kind="nf4")
    weights = list(model.parameters())
    codes = sum(weight.codes.nbytes for weight in weights if isinstance(weight, Quantized))
    return model, codes + 4 * sum(weight.numel() for weight in weights if not isinstance(weight, Quantized))


KINDS = {
    "bf16": partial(rounded, dtype=torch.bfloat16),
    "f16": partial(rounded, dtype=torch.float16),
    "int8": partial(packed, dtype=torch.int8),
    "int4": partial(packed, dtype=torch.int4),
    "nf4": nf4,
}


@torch.inference_mode()
def log_probabilities(model: Model, windows: Tensor) -> Iterator[Tensor]:
    """Log-probabilities (T - 1, V) of the next token in each window, float64."""
    for window in windows:
        yield log_softmax(model(window[None])[0, :-1].double(), dim=-1)


def report(name: str, n_bytes: int, model: Model, windows: Tensor, expected: list[Tensor]) -> None:
    """Print one line; expected: log-probabilities of the model to compare with."""
    loss = divergence = same = 0.0
    for window, base, found in zip(windows, expected, log_probabilities(model, windows), strict=True):
        loss -= found.gather(1, window[1:, None]).mean().item() / len(windows)
        exact = base.double()
        divergence += (exact.exp() * (exact - found)).sum(-1).mean().item() / len(windows)
        same += (exact.argmax(-1) == found.argmax(-1)).double().mean().item() / len(windows)
    perplexity = torch.tensor(loss).exp().item()
    print(f"{name[-27:]:<28}{n_bytes / 2**20:>8.1f}{perplexity:>12.3f}{divergence:>10.5f}{same:>8.1%}", flush=True)


def size_of(path: Path) -> int:
    """Bytes of the weights."""
    files = [path] if path.is_file() else [*path.glob("*.safetensors")]
    return sum(file.stat().st_size for file in files)


if __name__ == "__main__":
    main()
