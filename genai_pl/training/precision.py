"""Precision of a run: what `precision=auto` becomes on this machine, for this model.

Training tolerates products that are rounded to bfloat16, as weights, their gradients and the loss stay in float32; what it
gains depends on the machine. A GPU takes them where it has them. On a CPU a probe decides (`kernels.cpu_products`). A run keeps
what it began with, wherever it is resumed: its checkpoints hold the name. Commands that report numbers (evaluate.py,
generate.py, serve.py) do not use this: their answers should not depend on the machine.
"""

import os
from typing import NamedTuple

import torch
from omegaconf import DictConfig

from genai_pl.kernels.cpu_products import bf16_products_pay
from genai_pl.ranks import TASKS

AUTO = "auto"
SMALLEST = (
    128  # channels: with fewer, conversions and overhead eat what products gain, and choices would be close calls
)
SIZES = ("WORLD_SIZE", TASKS)  # processes of a run that torchrun or Slurm starts: each would probe by itself


class Precision(NamedTuple):
    """What a run computes in.

    lightning  Lightning's name: 32-true, bf16-mixed, ...
    matmul     of float32 products: highest, high or medium (`torch.set_float32_matmul_precision`)
    reason     why `auto` became this, for the summary; "" where the user has named it
    """

    lightning: str
    matmul: str
    reason: str = ""


def choose_precision(options: DictConfig, *, n_embd: int, device: str, stored: str | None = None) -> Precision:
    """The precision of a run, from the group `precision`.

    n_embd: channels of the model. device: cpu or cuda. stored: what the checkpoint of a resumed run says, None for a new run.
    """
    name, reason = options.lightning, ""
    if name == AUTO:
        name, reason = (stored, "as it began") if stored else _choose(n_embd, device)
    matmul = options.matmul
    if matmul == AUTO:
        matmul = "highest" if name == "32-true" else "high"
    return Precision(name, matmul, reason)


def _choose(n_embd: int, device: str) -> tuple[str, str]:
    """(Lightning's name, reason) of a new run."""
    if device != "cpu":
        has_bf16 = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return ("bf16-mixed", "this GPU has it") if has_bf16 else ("32-true", "this device has no bf16")
    if any(os.environ.get(name, "1") != "1" for name in SIZES):
        return "32-true", "processes on CPUs that torchrun or Slurm starts do not probe"
    if n_embd < SMALLEST:
        return "32-true", f"below {SMALLEST} channels bf16 gains nothing"
    if bf16_products_pay():
        return "bf16-mixed", "its products are faster here"
    return "32-true", "bf16 is no faster here"


def may_hold_in_16_bits(config: DictConfig) -> bool:
    """Whether frozen weights may be of another dtype than trained ones: shards must be of one, and float8 replaces layers."""
    strategy = config.strategy
    is_whole = "_target_" not in strategy and strategy.lightning.partition("_")[0] in ("auto", "ddp")
    return is_whole and not config.precision.get("float8")


def plan_precision(config: DictConfig, *, n_embd: int) -> DictConfig:
    """A copy of the configuration whose precision is that of a run on the hardware of the group `plan`."""
    gpu = config.plan.gpu != "cpu"
    if not gpu:
        bf16_products_pay()  # measured and kept here: later code runs on tensors without numbers
    name = "bf16-mixed" if gpu and config.precision.lightning == AUTO else None
    precision = choose_precision(config.precision, n_embd=n_embd, device="cpu", stored=name)
    config = config.copy()
    config.precision.lightning, config.precision.matmul = precision.lightning, precision.matmul
    return config
