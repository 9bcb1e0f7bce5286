"""Checks of a server's settings against the model that it has loaded, at the start instead of at every request."""

from typing import TYPE_CHECKING

from genai_pl.devices import memory_bytes
from genai_pl.errors import ConfigError
from genai_pl.generation import build_output_constraints, check_bias
from genai_pl.models import Model
from genai_pl.serving.settings import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MIB = 2**20


def check_names(name: str, settings: Settings) -> None:
    """ConfigError for an adapter with the name of the model, by which no request would reach it."""
    if name in settings.adapters:
        raise ConfigError(f"adapter: {name} is the model's own name; give one of them another (name=)")


def check_answerable(settings: Settings, model: Model, tokenizer: "PreTrainedTokenizerBase") -> None:
    """ConfigError for sampling settings that no answer of this model can follow, and a prefix cache beyond the memory."""
    device, mib = next(model.parameters()).device, settings.prefix_cache_mib
    if mib * MIB > (memory := memory_bytes(device)):
        raise ConfigError(f"prefix_cache_mib={mib:g}: {device} has {memory / MIB:,.0f} MiB in all; give less")
    defaults, vocab_size = settings.defaults, model.config.vocab_size
    check_bias(defaults, vocab_size)
    constraint = build_output_constraints(tokenizer, defaults, model.config.eos_token_ids).constraint
    if constraint is not None:
        constraint.begin(vocab_size)
