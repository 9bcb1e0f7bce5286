"""Devices and dtypes: the options `device` and `precision` as torch objects."""

import torch

from genai_pl.errors import ConfigError

# by Lightning's name of a precision: dtype of the weights, and of products under autocast
DTYPES = {
    "32-true": (torch.float32, None),
    "bf16-true": (torch.bfloat16, None),
    "bf16-mixed": (torch.float32, torch.bfloat16),
    "16-mixed": (torch.float32, torch.float16),
}


def dtypes_of(precision: str) -> tuple[torch.dtype, torch.dtype | None]:
    """(dtype of weights, dtype of autocast or None) for a precision; ConfigError for one that is for training only."""
    if precision == "auto":
        raise ConfigError("precision=auto is for training: what a command answers must not depend on the machine; fp32")
    if precision not in DTYPES:
        raise ConfigError(f"precision.lightning={precision}: expected one of {', '.join(DTYPES)}")
    return DTYPES[precision]


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
