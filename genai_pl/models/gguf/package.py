"""The package gguf, which llama.cpp's authors publish: imported late, and asked for in one line where it is absent."""

from importlib.util import find_spec
from types import ModuleType

from genai_pl.errors import ConfigError

INSTALL = "pip install gguf"
WRITABLE = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")  # quantize= of format=gguf


def gguf_package(what: str) -> ModuleType:
    """The module gguf; ConfigError if it is not installed. what: needs it, the beginning of the message."""
    if find_spec("gguf") is None:
        raise ConfigError(f"{what} needs the package gguf: {INSTALL}")
    import gguf

    return gguf


def check_type(name: str) -> None:
    """ConfigError for a type of numbers that is not written, with the way to get it where llama.cpp has one."""
    if name in WRITABLE:
        return
    known = ", ".join(WRITABLE)
    if name.lower() in WRITABLE:
        raise ConfigError(f"quantize={name}: write quantize={name.lower()}")
    name = name.lower()  # llama-quantize takes either
    if "_k" in name or name.startswith(("iq", "q2", "q3", "q6", "tq")):
        raise ConfigError(
            f"quantize={name}: written by llama.cpp alone: export quantize=f32, then "
            f"llama-quantize model.gguf model-{name}.gguf {name} (here: {known})"
        )
    raise ConfigError(f"quantize={name} is not one of {known}, which format=gguf writes")
