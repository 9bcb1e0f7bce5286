"""Peak memory of PPO with one base under everything, and with models of their own: python benchmarks/ppo_memory.py [--layers 8]

Every row is train.py in a process of its own on the CPU, with the same prompts, completions and minibatches; the figure is
its largest resident size (ru_maxrss), and what of it is above the same job on a model of almost no size. glibc keeps what a
program frees for later, in holes that count as resident: the limit above which it gives memory back is set to 64 KiB.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
QUIET = (
    "trainer.accelerator=cpu", "trainer.limit_val_batches=0", "callbacks.samples.every_n_steps=null", "logger=[]",
    "optimizer=adamw",
)  # fmt: skip
PPO = (
    "objective=ppo", "data.path=prompts.jsonl", "data.batch_size=4", "objective.max_new_tokens=16",
    "objective.minibatch_size=2", "objective.epochs=1", "trainer.max_steps=2", "callbacks.export=false",
)  # fmt: skip
ROWS = {
    "one base: LoRA policy, reward adapter, value head": ("peft=lora", "objective.reward=judge_adapter"),
    "LoRA policy, reward model of its own": ("peft=lora", "objective.reward=judge_model"),
    "LoRA policy, reward model and critic of their own": (
        "peft=lora", "objective.reward=judge_model", "objective.critic=judge_model",
    ),
    "four models: policy, reference, reward, critic": ("objective.reward=judge_model", "objective.critic=judge_model"),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=512)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        floors = measure(Path(folder) / "small", layers=1, width=32)
        found = measure(Path(folder) / "large", layers=args.layers, width=args.width)
    print("| PPO step | peak, MiB | above a model of no size, MiB |\n|---|---|---|")
    for name, mib in found.items():
        print(f"| {name} | {mib:,.0f} | {mib - floors[name]:,.0f} |")
    first, *_, last = (found[name] - floors[name] for name in ROWS)
    print(f"\nfour models over one base: {last / first:.2f}")


def measure(folder: Path, *, layers: int, width: int) -> dict[str, float]:
    """Peaks in MiB, by row."""
    folder.mkdir()
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"{n} is "}) + "\n" for n in range(32)))
    pairs = [{"prompt": f"{n} is ", "chosen": "good", "rejected": "bad"} for n in range(32)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    shape = ("model=llama", f"model.n_layer={layers}", f"model.n_embd={width}", "model.n_head=4", "model.n_kv_head=4",
             f"model.intermediate_size={4 * width}", "model.max_seq_len=64", "tokenizer=byte")  # fmt: skip
    once = (*QUIET, "trainer.max_steps=1", "data.batch_size=2")
    run(folder, "train.py", *shape, *once, "data.path=prompts.jsonl", "data.column=prompt", "hydra.run.dir=base")
    judge = ("objective=reward", "init_from=base/model", *once, "data.path=pairs.jsonl")
    run(folder, "train.py", *judge, "peft=lora", "hydra.run.dir=judge_adapter")
    run(folder, "export.py", "checkpoint=judge_adapter", "format=merged", "out=judge_model")
    return {name: run(folder, "train.py", *PPO, *QUIET, "init_from=base/model", *row) for name, row in ROWS.items()}


def run(folder: Path, command: str, *arguments: str) -> float:
    """The peak of a command in MiB; the benchmark ends with its last line if it fails."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    with (folder / "log").open("w+") as log:
        process = subprocess.Popen(
            [sys.executable, ROOT / command, *arguments], cwd=folder, env=environment, stdout=log, stderr=log
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            log.seek(0)
            sys.exit(f"error: {command} failed: {log.read().strip().splitlines()[-1]}")
    return usage.ru_maxrss / 2**10


if __name__ == "__main__":
    main()
