"""The whole life of a language model in one Lightning Trainer: `load`, `generate` and `train` are its commands as functions."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from genai_pl.api import generate, train
    from genai_pl.loading import load

__all__ = ["generate", "load", "train"]


def __getattr__(name: str) -> object:
    """The functions are imported when they are asked for: `import genai_pl` alone loads nothing."""
    if name not in __all__:
        raise AttributeError(f"module 'genai_pl' has no attribute {name!r}")
    from genai_pl import api

    return getattr(api, name)
