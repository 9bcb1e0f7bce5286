"""Peak memory of one training job with each way of saving it: python benchmarks/memory.py [--check] [OVERRIDE ...]

Every row is train.py in processes of its own on the CPU: the largest resident size of any of its processes (ru_maxrss),
what of it is above a job of almost no size, and the seconds of the command. All rows take the same steps.

--check compares what dry_run=true estimates with what is measured. glibc keeps what a program frees for later, in holes
that count as resident: there the limit above which it gives memory back at once is set to 64 KiB.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
JOB = (
    "trainer.accelerator=cpu",
    "trainer.max_steps=2",
    "trainer.limit_val_batches=0",
    "callbacks.samples.every_n_steps=null",
    "callbacks.export=false",
    "tokenizer=byte",
    "logger=[]",
)
MODEL = ("model.n_layer=8", "model.n_embd=256", "data.batch_size=16")
NOTHING = ("model.n_layer=1", "model.n_embd=32", "data.batch_size=1")
SAVERS = {
    "nothing saved": (),
    "recompute cheap operations": ("trainer.recompute=selective",),
    "recompute every 2nd block": ("trainer.recompute=full", "trainer.recompute_every=2"),
    "recompute every block": ("trainer.recompute=full",),
    "optimizer in backward": ("trainer.optimizer_in_backward=true", "trainer.gradient_clip_val=null"),
    "4 batches of a quarter": ("trainer.accumulate_grad_batches=4", "data.batch_size=4"),
    "LoRA": ("peft=lora",),
    "2 processes, ddp": ("trainer=ddp", "trainer.devices=2", "data.batch_size=8"),
    "2 processes, fsdp": ("trainer=fsdp", "trainer.devices=2", "data.batch_size=8"),
    "2 processes, heads divided": ("strategy=tensor_parallel", "trainer.devices=2"),
    "2 processes, fsdp, recompute": (
        "trainer=fsdp",
        "trainer.devices=2",
        "data.batch_size=8",
        "trainer.recompute_every=1",
    ),
}
CHECKED = {
    "plain": (),
    "AdamW, twice as wide": ("optimizer=adamw", "model.n_embd=512", "data.batch_size=8"),
    "GPT-2's vocabulary": (
        "model=gpt",
        "model.n_layer=4",
        "model.n_embd=256",
        "model.n_head=4",
        "model.vocab_size=50257",
    ),
    "4 batches of a quarter": ("trainer.accumulate_grad_batches=4", "data.batch_size=4"),
    "recompute every block": ("trainer.recompute=full",),
    "recompute cheap operations": ("trainer.recompute=selective",),
    "LoRA": ("peft=lora",),
}
TIGHT = {"MALLOC_MMAP_THRESHOLD_": "65536"}


def main() -> None:
    if "--check" in sys.argv:
        check([a for a in sys.argv[1:] if a != "--check"])
        return
    floor, _ = measure(*JOB, *NOTHING)
    print(f"{'saver':30s} {'GiB':>6s} {'of the job':>10s} {'seconds':>8s}")
    for name, options in SAVERS.items():
        peak, seconds = measure(*JOB, *MODEL, *sys.argv[1:], *options)
        print(f"{name:30s} {peak:6.2f} {peak - floor:10.2f} {seconds:8.1f}", flush=True)


def check(overrides: list[str]) -> None:
    """Print estimated and measured bytes of jobs, and their ratio."""
    floor, _ = measure(*JOB, *NOTHING, **TIGHT)
    floor -= estimate(*JOB, *NOTHING)
    print(f"{'job':30s} {'estimated':>10s} {'measured':>10s} {'ratio':>6s}   GiB above an empty process")
    for name, options in CHECKED.items():
        job = (*JOB, *MODEL, *options, *overrides)
        expected, found = estimate(*job), measure(*job, **TIGHT)[0] - floor
        print(f"{name:30s} {expected:10.3f} {found:10.3f} {expected / found:6.2f}", flush=True)


def estimate(*options: str) -> float:
    """The GiB that dry_run=true prints as the total of a device."""
    command = [sys.executable, str(ROOT / "train.py"), *options, "dry_run=true", "plan=cpu"]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    number, unit = re.search(r"^  total +(\S+) (\S+)", out, re.MULTILINE).groups()
    return float(number) * {"KiB": 2**-20, "MiB": 2**-10, "GiB": 1.0}[unit]


def measure(*options: str, **environment: str) -> tuple[float, float]:
    """The largest resident size of a process of the run in GiB, and the seconds that it took."""
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "log").open("w+") as log:
        command = [sys.executable, str(ROOT / "train.py"), *options, f"hydra.run.dir={folder}/run"]
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | environment)
        _, status, usage = os.wait4(process.pid, 0)  # counts the processes that it has waited for
        if status:
            log.seek(0)
            sys.exit(f"{' '.join(options)}\n{log.read()[-1000:]}")
        return usage.ru_maxrss / 2**20, time.perf_counter() - start


if __name__ == "__main__":
    main()
