"""How long the default job takes to a validation loss: python benchmarks/time_to_loss.py TEXT [--peer[=STEPS]] [OVERRIDE ...]

Prints, for every validation of one run on TEXT (last tenth held out), seconds since the command was typed and
nats per byte, and when 1.88 nats was passed: what nanoGPT's CPU configuration states for tiny Shakespeare in about
three minutes (karpathy/nanoGPT, README). Needs nothing but the project.

--peer then runs that configuration as a plain loop over transformers' GPT-2 on the same machine (characters, 4 layers of
128, 12 rows of 64), and prints two ratios: of the seconds of training steps alone, and of all seconds since the command,
with start, tokenizer and the validations that look for the goal (every 25 steps here, every 50 from step 500 there).
Its schedule has 2,000 steps, as nanoGPT's; where those end above 1.88, --peer=3000 stretches it.
"""

import csv
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
GOAL = 1.88


def main() -> None:
    peers = [argument for argument in sys.argv[1:] if argument.startswith("--peer")]
    arguments = [argument for argument in sys.argv[1:] if argument not in peers]
    if not arguments:
        sys.exit(__doc__)
    ours = default_job(*arguments)
    if peers:
        steps = int(peers[0].partition("=")[2] or 2000)
        theirs = plain_loop(Path(arguments[0]).read_text(encoding="utf-8"), steps)
        if ours and theirs:
            for what, mine, other in zip(("steps alone", "since the command"), ours, theirs, strict=True):
                print(
                    f"to {GOAL} nats, {what}: ours {mine:.0f} s, the plain loop {other:.0f} s, ratio {mine / other:.2f}"
                )


def default_job(text: str, *overrides: str) -> tuple[float, float] | None:
    """Seconds of training steps, and since the command, until the first validation at GOAL."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [sys.executable, str(ROOT / "train.py"), f"data.path={text}", f"hydra.run.dir={run}"]
        command += ["trainer.val_check_interval=25", "trainer.log_every_n_steps=25", *overrides]
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        seen: dict[int, float] = {}
        passed: list[tuple[float, float]] = []
        while process.poll() is None:
            report(run / "metrics.csv", time.perf_counter() - start, seen, passed)
            time.sleep(0.2)
        report(run / "metrics.csv", time.perf_counter() - start, seen, passed)
    print(f"whole command: {time.perf_counter() - start:.0f} s, exit status {process.returncode}")
    return passed[0] if passed else None


def report(table: Path, seconds: float, seen: dict[int, float], passed: list[tuple[float, float]]) -> None:
    """Print the validations that have appeared since the last look; `passed` gets the seconds of those at GOAL."""
    if not table.exists():
        return
    with table.open() as file:
        rows = list(csv.DictReader(file))
    stepping, tokens = 0.0, 0.0
    for row in rows:
        if row.get("train/tokens_per_sec"):
            stepping += (float(row["train/tokens_seen"]) - tokens) / float(row["train/tokens_per_sec"])
            tokens = float(row["train/tokens_seen"])
        if not row.get("val/bpb"):
            continue
        step, nats = int(row["step"]), float(row["val/bpb"]) * math.log(2)
        if step in seen:
            continue
        seen[step] = nats
        mark = f"   <- passed {GOAL}" if nats <= GOAL and not passed else ""
        if nats <= GOAL:
            passed.append((stepping, seconds))
        print(f"step {step:5d}  {stepping:6.1f} of {seconds:6.1f} s  {nats:.4f} nats/byte{mark}", flush=True)


def plain_loop(text: str, steps: int) -> tuple[float, float] | None:
    """Seconds of training steps, and of all the loop's work, until its validation loss is at GOAL; None if it never is."""
    begin = time.perf_counter()
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    T, B, warmup = 64, 12, 100
    # characters, the last tenth for validation
    ids = {character: n for n, character in enumerate(sorted(set(text)))}
    data = torch.tensor([ids[character] for character in text])
    train, held_out = data[: int(0.9 * len(data))], data[int(0.9 * len(data)) :]
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            n_layer=4, n_head=4, n_embd=128, vocab_size=len(ids), n_positions=T,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1)

    def batch(source: torch.Tensor, starts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows = torch.stack([source[i : i + T + 1] for i in starts])
        return rows[:, :-1], rows[:, 1:]

    def loss(inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(model(inputs).logits.flatten(0, 1), labels.flatten())

    seconds = 0.0
    for step in range(1, steps + 1):
        start = time.perf_counter()
        ratio = min(1.0, max(0, step - warmup) / (steps - warmup))
        lr = 1e-3 * step / warmup if step < warmup else 1e-4 + 0.45e-3 * (1 + math.cos(math.pi * ratio))
        for group in optimizer.param_groups:
            group["lr"] = lr
        value = loss(*batch(train, torch.randint(len(train) - T, (B,))))
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds += time.perf_counter() - start
        if step % 50 == 0 and step >= 500:
            with torch.no_grad():
                val = loss(*batch(held_out, torch.arange(0, len(held_out) - T - 1, T))).item()
            print(f"plain loop: step {step:5d}  {seconds:6.1f} s  {val:.4f} nats/char", flush=True)
            if val <= GOAL:
                return seconds, time.perf_counter() - begin
    return None


if __name__ == "__main__":
    main()
