"""One side of a comparison in a process of its own, so that neither finds the machine as the other has left it.

`CLOCK=cpu` before the command of a benchmark of training counts the processor's seconds of each side instead of the wall's, for
a machine that others use too; with `OMP_NUM_THREADS=1` that is about what the wall's would be on a machine of its own.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

# the adapter of every peer, as peft's LoraConfig takes it; ours is the default of genai_pl.peft.lora
PEFT = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "task_type": "CAUSAL_LM"}
CLOCK = time.process_time if os.environ.get("CLOCK") == "cpu" else time.perf_counter
Side = Callable[[], dict[str, float]]  # gives its `figures`


def measured(*side: str, python: str = sys.executable, given: list[str] | None = None) -> Any:
    """What this benchmark prints last, read as JSON, when it is run again with `--side`; the error ends it in one line."""
    given = sys.argv[1:] if given is None else given
    command = [python, "-W", "ignore", sys.argv[0], *given, "--side", *side]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip() or "no reason given").splitlines()[-1]
        sys.exit(f"error: {' '.join(side)} failed: {said} (pip install -e '.[dev,bench]' for the peers)")
    return json.loads(done.stdout.strip().splitlines()[-1])


def in_turns(sides: dict[str, Side], side: str | None, unit: str, *, turns: int, python: str = sys.executable) -> None:
    """Print rate, memory and ratio of `ours` and one peer, measured in turns; in the process of a side, its own figures."""
    if side:
        print(json.dumps(sides[side]()))
        return
    (peer,) = set(sides) - {"ours"}
    ratios = []
    for turn in range(1, turns + 1):
        mine, theirs = measured("ours"), measured(peer, python=python)
        ratios.append(mine["rate"] / theirs["rate"])
        print(
            f"turn {turn}: ours {mine['rate']:.2f} {unit}/s, {mine['gib']:.2f} GiB   {peer} {theirs['rate']:.2f}, "
            f"{theirs['gib']:.2f} GiB   ratio {ratios[-1]:.2f}, memory {mine['gib'] / theirs['gib']:.2f}",
            flush=True,
        )
    print(f"median ratio {statistics.median(ratios):.2f}")


def training(lr: float) -> dict[str, object]:
    """What a module of ours takes to train with AdamW at one rate."""
    from genai_pl.optim import adamw, constant

    return {
        "optimizer": lambda named: adamw(named, lr=lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0),
        "schedule": lambda step, total_steps: constant(step, total_steps=total_steps, warmup_steps=0),
    }


def fit(module: Any, data: Any, max_steps: int, *, seen: Callable[[dict], None] | None = None) -> list[float]:
    """The times in seconds at which Lightning's Trainer ended the batches of a module of ours, each of which `seen` gets."""
    import lightning as L

    times: list[float] = []

    class Ticks(L.Callback):
        def on_train_batch_end(self, trainer: object, module: object, outputs: object, batch: dict, *_: object) -> None:
            times.append(CLOCK())
            if seen is not None:
                seen(batch)

    L.Trainer(
        max_steps=max_steps, limit_val_batches=0, accelerator="cpu", logger=False, callbacks=[Ticks()],
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    ).fit(module, data)  # fmt: skip
    return times


def ticks(times: list[float]) -> object:
    """A callback of transformers' Trainer, which TRL's are, that notes when steps end."""
    from transformers import TrainerCallback

    class Ticks(TrainerCallback):
        def on_step_end(self, *_: object, **__: object) -> None:
            times.append(CLOCK())

    return Ticks()


def trl_settings(folder: str) -> dict[str, object]:
    """What every configuration of TRL takes here: float32 on the CPU, nothing saved, said or recomputed."""
    return {
        "output_dir": folder, "report_to": [], "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True,
        "use_cpu": True, "bf16": False, "dataloader_pin_memory": False, "gradient_checkpointing": False,
    }  # fmt: skip


def figures(times: list[float], n: int) -> dict[str, float]:
    """n things from the first of the times (in seconds) to the last, per second; and the peak memory of this process in GiB."""
    return {"rate": n / (times[-1] - times[0]), "gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
