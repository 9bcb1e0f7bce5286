"""Every method of conf/peft on one base: what it trains, memory and time of a step, decoding, loss; PEFT beside it (Linux).

    python benchmarks/peft_table.py --model FOLDER --data FILE.jsonl [--steps 10] [--batch 2] [--length 64] [--out FILE]
    python benchmarks/peft_table.py --tiny

Each row is a process of its own. Both sides get the same weights, batches, AdamW, rate and loop; ours then PEFT's, in turn.
Memory is the peak (resident) from the first step on, less what the process held before it loaded the model.
"""

import argparse
import ctypes
import importlib
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

ROOT = Path(__file__).parent.parent
RATES = {"none": 5e-5, "ia3": 5e-3, "prompt": 0.1, "prefix": 1e-2}  # of AdamW; 5e-4 for the others
VARIANTS = {"lora-nf4": ("lora", {"quantize": "nf4"}), "lora-int8": ("lora", {"quantize": "int8"})}
PEERS = ("none", "lora", "ia3", "prompt", "prefix")
N_VIRTUAL, NEW_TOKENS = 20, 16


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a Hugging Face folder of a family of ours")
    parser.add_argument("--data", help="lines of JSON with prompt and completion, or text; random tokens without it")
    parser.add_argument("--tiny", action="store_true", help="a small random GPT-2, as without --model")
    for name, value in (("steps", 10), ("batch", 2), ("length", 64)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--methods", nargs="+", default=methods(), help="rows of the table")
    parser.add_argument("--out", help="a JSON file for the figures")
    parser.add_argument("--side", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def methods() -> list[str]:
    """The options of the group `peft`, full training first, and what else is worth a row."""
    found = sorted(path.stem for path in (ROOT / "conf" / "peft").glob("*.yaml"))
    return ["none", *(name for name in found if name != "none"), *VARIANTS]


def batches(args: argparse.Namespace) -> Tensor:
    """(steps + 1, B, T) token ids; the last batch is held out."""
    shape = (args.steps + 1, args.batch, args.length)
    if not args.data:
        return torch.randint(3, 256, shape, generator=torch.Generator().manual_seed(0))
    from transformers import AutoTokenizer

    tokenizer, ids, n = AutoTokenizer.from_pretrained(args.model), [], math.prod(shape)
    with Path(args.data).open(encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            ids += tokenizer.encode(row.get("text") or f"{row['prompt']}\n{row['completion']}\n\n")
            if len(ids) >= n:
                return torch.tensor(ids[:n]).view(shape)
    sys.exit(f"error: --data={args.data} has {len(ids)} tokens, {n} are needed: lower --steps, --batch or --length")


class Ours:
    """Our way to load, adapt, compute the loss and decode."""

    def __init__(self, folder: str) -> None:
        from genai_pl.models import load_pretrained

        self.model: nn.Module = load_pretrained(Path(folder))

    def adapt(self, method: str) -> None:
        from genai_pl.peft import METHODS

        name, options = VARIANTS.get(method, (method, {"dora": True} if method == "dora" else {}))
        self.model = METHODS[name].make(self.model, **options)

    def loss(self, ids: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    def decode(self, ids: Tensor, n: int) -> None:
        from genai_pl.config.generation import GenerationConfig
        from genai_pl.generation import generate

        generate(self.model, ids, GenerationConfig(max_new_tokens=n, temperature=0.0))


class Peft:
    """That of PEFT with transformers."""

    def __init__(self, folder: str) -> None:
        from transformers import AutoModelForCausalLM

        self.model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def adapt(self, method: str) -> None:
        import peft

        self.model = peft.get_peft_model(self.model, _peft_config(peft, method, self.model.config.model_type))

    def loss(self, ids: Tensor) -> Tensor:
        labels = ids.clone()
        labels[:, 0] = -100  # virtual tokens would predict it, which ours do not
        return self.model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss

    def decode(self, ids: Tensor, n: int) -> None:
        options = {"max_new_tokens": n, "min_new_tokens": n, "do_sample": False, "pad_token_id": 0}
        self.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)


def _peft_config(peft: object, method: str, model_type: str) -> object:
    gpt2 = model_type == "gpt2"  # whose q, k and v are one layer
    down = "mlp.c_proj" if gpt2 else "down_proj"
    common = {"task_type": "CAUSAL_LM"}
    if method == "lora":
        targets = ["c_attn", "attn.c_proj"] if gpt2 else ["q_proj", "k_proj", "v_proj", "o_proj"]
        return peft.LoraConfig(r=8, lora_alpha=16, target_modules=targets, fan_in_fan_out=gpt2, **common)
    if method == "ia3":
        targets = ["c_attn"] if gpt2 else ["k_proj", "v_proj"]
        wide = {"target_modules": [*targets, down], "feedforward_modules": [down]}
        return peft.IA3Config(fan_in_fan_out=gpt2, **wide, **common)
    kind = peft.PromptTuningConfig if method == "prompt" else peft.PrefixTuningConfig
    return kind(num_virtual_tokens=N_VIRTUAL, **common)


def resident(key: str) -> int:
    """Bytes that this process holds (VmRSS), or has held at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def measure(args: argparse.Namespace) -> dict[str, object]:
    """The figures of one side and method."""
    kind, method = args.side
    torch.manual_seed(0)
    *train, held_out = batches(args)
    importlib.import_module("genai_pl.loading" if kind == "ours" else "peft")  # before the memory is read
    before = resident("VmRSS")
    side = {"ours": Ours, "peft": Peft}[kind](args.model)
    base_s = _per_token(side, held_out[:1, :16])
    if method != "none":
        side.adapt(method)
    side.model.eval()  # no dropout on either side
    trained = [p for p in side.model.parameters() if p.requires_grad]
    count = sum(p.numel() for p in trained)
    figures = {"trained": count, "share": count / sum(p.numel() for p in side.model.parameters()), "base_s": base_s}
    optimizer = torch.optim.AdamW(trained, lr=RATES.get(method, 5e-4), weight_decay=0.0)
    with torch.no_grad():
        figures["loss_before"] = side.loss(held_out).item()
    ctypes.CDLL(None).malloc_trim(0)  # what quantizing has freed is no memory of the step
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak from here on
    times = list(_steps(side, optimizer, train))
    figures["memory"] = resident("VmHWM") - before
    figures["step_s"] = statistics.median(times[1:] or times)
    with torch.no_grad():
        figures["loss_after"] = side.loss(held_out).item()
    figures["decode_s"] = _per_token(side, held_out[:1, :16])
    return figures


def _steps(side: Ours | Peft, optimizer: torch.optim.Optimizer, train: list[Tensor]) -> Iterator[float]:
    for batch in train:
        start = time.perf_counter()
        optimizer.zero_grad()
        side.loss(batch).backward()
        optimizer.step()
        yield time.perf_counter() - start


@torch.no_grad()
def _per_token(side: Ours | Peft, prompt: Tensor) -> float:
    """Seconds of a token beyond the first, greedy, one row: the best of three."""

    def seconds(n: int) -> float:
        start = time.perf_counter()
        side.decode(prompt, n)
        return time.perf_counter() - start

    seconds(2)
    return min(seconds(1 + NEW_TOKENS) - seconds(1) for _ in range(3)) / NEW_TOKENS


def run(kind: str, method: str, folder: str) -> dict[str, object] | str:
    """The figures of a process of its own, or the last line of what went wrong."""
    command = [sys.executable, "-W", "ignore", __file__, *sys.argv[1:], "--model", folder, "--side", kind, method]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return done.stderr.strip().splitlines()[-1]
    return json.loads(done.stdout.strip().splitlines()[-1])


def tiny(folder: Path) -> str:
    """Where a random GPT-2 of two layers has been written."""
    from genai_pl.models import ModelConfig, build_model, save_pretrained

    torch.manual_seed(0)
    model = build_model(ModelConfig(n_layer=2, n_head=4, n_embd=64, vocab_size=256, max_seq_len=256))
    save_pretrained(model, folder, token_ids={"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0})
    return str(folder)


def show(kind: str, method: str, found: dict[str, object] | str) -> None:
    """A row of the table."""
    if isinstance(found, str):
        print(f"| {method} | {kind} | {found.rpartition('Error: ')[2]} |", flush=True)
        return
    print(
        f"| {method} | {kind} | {found['trained']:,} | {100 * found['share']:.3f} % | {found['memory'] / 2**20:,.0f} | "
        f"{found['step_s']:.2f} | {1000 * found['decode_s']:.0f} ({found['decode_s'] / found['base_s']:.2f}) | "
        f"{found['loss_before']:.3f} -> {found['loss_after']:.3f} |",
        flush=True,
    )


def table(args: argparse.Namespace) -> dict[str, object]:
    """Measure and print every row."""
    print("| method | by | trained | share | step's peak, MiB | step, s | token, ms (over base) | held-out loss |")
    print("|---|---|---|---|---|---|---|---|")
    figures = {}
    for method in args.methods:
        for kind in ("ours", "peft") if method in PEERS else ("ours",):
            figures[f"{kind} {method}"] = found = run(kind, method, args.model)
            show(kind, method, found)
    print("\n| PEFT over ours | step's peak | step | token |\n|---|---|---|---|")
    for method in args.methods:
        mine, theirs = figures[f"ours {method}"], figures.get(f"peft {method}")
        if isinstance(mine, dict) and isinstance(theirs, dict):
            ratios = (f"{theirs[key] / mine[key]:.2f}" for key in ("memory", "step_s", "decode_s"))
            print(f"| {method} | {' | '.join(ratios)} |")
    return figures


def main() -> None:
    args = parse()
    if args.side:
        print(json.dumps(measure(args)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        args.model = tiny(Path(temporary)) if args.tiny or not args.model else args.model
        figures = table(args)
    if args.out:
        Path(args.out).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
