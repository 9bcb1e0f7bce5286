"""Block sizes of the flash attention kernels: fixed tables by architecture, head size and kernel.

Chosen from what the compiler reports (registers, spills, shared memory, programs per multiprocessor), not by a search at run
time: no call waits for tuning, and every run computes in the same order.
"""

import functools
from typing import Any, NamedTuple

import torch
import triton


class Blocks(NamedTuple):
    """BLOCK_M queries and BLOCK_N keys per block, warps per program, and stages of the software pipeline."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int

    def options(self) -> dict[str, Any]:
        """The compiler's options."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


# (kernel, head_dim up to) -> blocks where the inner loop is (plain, featured)
SM80 = {
    ("forward", 64): ((128, 64, 4, 2), (128, 32, 4, 2)),
    ("forward", 128): ((128, 64, 8, 2), (128, 32, 8, 2)),
    ("forward", 256): ((64, 64, 8, 2), (64, 64, 8, 2)),
    ("key_value", 64): ((64, 128, 8, 2), (32, 128, 8, 2)),
    ("key_value", 128): ((64, 64, 8, 2), (32, 64, 8, 2)),
    ("key_value", 256): ((32, 32, 8, 1), (32, 32, 8, 1)),
    ("query", 64): ((64, 64, 4, 2), (64, 32, 4, 2)),
    ("query", 128): ((64, 64, 8, 2), (64, 32, 8, 2)),
    ("query", 256): ((64, 32, 8, 1), (64, 32, 8, 1)),
    ("bias", 64): ((64, 64, 8, 1), (64, 64, 8, 1)),
    ("bias", 128): ((64, 32, 8, 1), (64, 32, 8, 1)),
    ("bias", 256): ((32, 32, 8, 1), (32, 32, 8, 1)),
    ("split", 128): ((16, 64, 4, 2), (16, 64, 4, 2)),
    ("split", 256): ((16, 32, 4, 2), (16, 32, 4, 2)),
}
SMALL_SHARED = SM80 | {  # 99 KiB of shared memory per program, not 163
    ("forward", 256): ((64, 32, 8, 2), (64, 32, 8, 2)),
    ("query", 256): ((32, 32, 8, 1), (32, 32, 8, 1)),
}
SM90 = SM80 | {
    ("forward", 64): ((128, 128, 8, 2), (128, 64, 8, 2)),
    ("forward", 128): ((128, 128, 8, 2), (128, 64, 8, 2)),
    ("forward", 256): ((128, 32, 8, 2), (128, 32, 8, 2)),
    ("key_value", 64): ((64, 128, 8, 2), (64, 64, 8, 2)),
    ("query", 64): ((128, 64, 8, 2), (64, 64, 8, 2)),
    ("query", 256): ((32, 32, 8, 1), (32, 32, 8, 1)),
    ("bias", 128): ((64, 64, 8, 1), (64, 64, 8, 1)),
}
FLOAT32 = {
    ("forward", 64): ((64, 32, 8, 2), (64, 32, 8, 2)),
    ("forward", 128): ((64, 16, 8, 1), (64, 16, 8, 1)),
    ("forward", 256): ((32, 32, 8, 1), (32, 32, 8, 1)),
    ("key_value", 64): ((32, 32, 4, 2), (32, 32, 4, 2)),
    ("key_value", 128): ((16, 32, 8, 1), (16, 32, 8, 1)),
    ("key_value", 256): ((16, 16, 8, 1), (16, 16, 8, 1)),
    ("query", 64): ((32, 32, 4, 1), (32, 32, 4, 1)),
    ("query", 256): ((32, 16, 4, 1), (32, 16, 4, 1)),
    ("bias", 128): ((32, 32, 4, 1), (32, 32, 4, 1)),
    ("bias", 256): ((16, 16, 8, 1), (16, 16, 8, 1)),
    ("split", 64): ((16, 32, 4, 2), (16, 32, 4, 2)),
    ("split", 256): ((16, 16, 4, 1), (16, 16, 4, 1)),
}
INTERPRETER = {
    (kind, 256): ((32, 32, 4, 1), (32, 32, 4, 1)) for kind in ("forward", "key_value", "query", "bias", "split")
}
TABLES = {"sm80": SM80, "sm90": SM90, "sm100": SM90}


def launch_config(kind: str, head_dim: int, dtype: torch.dtype, arch: str, featured: bool) -> Blocks:
    """The blocks of one kernel (forward, key_value, query, bias, split) for heads of head_dim, a power of two.

    arch: from `architecture`; unknown ones get the blocks of a small NVIDIA GPU. featured: whether the inner loop computes
    more than a causal softmax.
    """
    table = TABLES.get(arch, SMALL_SHARED)
    if dtype == torch.float32:
        table = FLOAT32
    if arch == "interpreter":
        table = INTERPRETER
    fits = min(width for name, width in table if name == kind and width >= head_dim)
    return Blocks(*table[kind, fits][featured])


@functools.cache
def architecture(device: torch.device) -> str:
    """The key of the tables for a device: sm80, sm90, ..., hip or interpreter."""
    if triton.knobs.runtime.interpret:
        return "interpreter"
    if torch.version.hip:
        return "hip"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"


@functools.cache
def n_processors(device: torch.device) -> int:
    """Multiprocessors of the device, each of which runs a program at least; 8 off a GPU, where only tests run."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


def precision(dtype: torch.dtype, arch: str) -> str:
    """The precision of float32 products: ieee, or tf32 if torch.set_float32_matmul_precision allows tensor cores to round."""
    exact = dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    return "ieee" if exact or not arch.startswith("sm") else "tf32"
