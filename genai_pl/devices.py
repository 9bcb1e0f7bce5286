"""Devices and dtypes: the options `device` and `precision` as torch objects."""

import os

import torch

from genai_pl.errors import ConfigError

# by Lightning's name of a precision: dtype of the weights, and of products under autocast
DTYPES = {
    "32-true": (torch.float32, None),
    "bf16-true": (torch.bfloat16, None),
    "bf16-mixed": (torch.float32, torch.bfloat16),
    "16-mixed": (torch.float32, torch.float16),
}

CODES = {"int8": torch.int8, "int4": torch.int4}  # dtypes of weights that are codes with scales, by the option's name


def dtypes_of(precision: str) -> tuple[torch.dtype, torch.dtype | None]:
    """(dtype of weights, dtype of autocast or None) for a precision; ConfigError for one that is for training only."""
    if precision == "auto":
        raise ConfigError("precision=auto is for training: what a command answers must not depend on the machine; fp32")
    if precision not in DTYPES:
        raise ConfigError(f"precision.lightning={precision}: expected one of {', '.join(DTYPES)}")
    return DTYPES[precision]


def weights_of(precision: str, dtype: str | None, device: torch.device) -> tuple[torch.dtype, torch.dtype | None]:
    """`dtypes_of` the precision, or of the option dtype: int8 or int4 weights, for products in float32 on a CPU.

    ConfigError for another dtype, and for these beside a precision or device that has them not.
    """
    if dtype is None:
        return dtypes_of(precision)
    if dtype not in CODES:
        raise ConfigError(f"dtype={dtype}: expected {' or '.join(CODES)}, or null for the weights of precision=")
    if dtypes_of(precision) != (torch.float32, None):
        raise ConfigError(f"dtype={dtype} computes in float32: leave precision out")
    check_codes(dtype, device)
    return CODES[dtype], None


def check_codes(dtype: str, device: torch.device) -> None:
    """ConfigError for a device that has no products with weights of a dtype of `CODES`."""
    if device.type != "cpu":
        raise ConfigError(f"dtype={dtype} multiplies on a CPU, not on {device}: set device=cpu, or leave dtype out")


def choose_device(name: str) -> torch.device:
    """The device of that name; "auto" is the GPU if there is one. ConfigError for a device that cannot compute here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # allocating nothing is enough for torch to reject a device that is missing
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0].partition(". ")[0]
        raise ConfigError(f"device={name}: expected auto, cpu or cuda ({reason})") from None
    if device.type == "meta" or (device.type == "cpu" and device.index):
        raise ConfigError(f"device={name}: expected auto, cpu or cuda")
    return device


def memory_bytes(device: torch.device) -> int:
    """Bytes of memory of a device; of the machine for a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
