"""genai_pl: a language model's whole life in one Lightning Trainer; `load`, `generate` and `train` are its commands as functions.

>>> import genai_pl
>>> model, tokenizer, path = genai_pl.load("runs/mine")  # doctest: +SKIP
"""

from importlib import import_module
from typing import TYPE_CHECKING

from genai_pl.imports import collecting_later

if TYPE_CHECKING:
    from genai_pl.api import generate, train
    from genai_pl.loading import load

__all__ = ["generate", "load", "train"]
MODULES = {"generate": "api", "load": "loading", "train": "api"}


def __getattr__(name: str) -> object:
    """Import the function on its first use: `import genai_pl` alone loads neither torch nor Lightning."""
    if name not in MODULES:
        raise AttributeError(f"module 'genai_pl' has no attribute {name!r}")
    with collecting_later():
        module = import_module(f"genai_pl.{MODULES[name]}")
    return getattr(module, name)
