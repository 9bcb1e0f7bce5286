"""Generation defaults of a model folder, and the tokens that end a text of its model.

A model may have several end tokens: eos of the tokenizer, those of config.json and generation_config.json (Llama 3 has
three), and the marker that closes a turn of the chat template. Generation stops at any of them. Other generation
defaults of a folder (temperature, top_p, ...) are not applied here, where decoding has its own options, but are written
into every folder that is made from the model, so that other programs still find them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from genai_pl.config.model import ModelConfig
from genai_pl.data.prompt_tokens import turn_end_token
from genai_pl.data.tokenizer import end_token
from genai_pl.errors import CheckpointError, UserError
from genai_pl.models.hf.folder import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from genai_pl.models.hf.transformers_config import WrappedConfig

GENERATION, EOS = "generation_config.json", "eos_token_id"
STALE = ("transformers_version", "_from_model_config", "_commit_hash")  # about the program that wrote the file


class GenerationDefaults(NamedTuple):
    """Generation settings that a model folder brings.

    generation: the values of generation_config.json, without those about the program that wrote it.
    config: `eos_token_id` of config.json, where it has one.
    """

    generation: Mapping[str, object] = {}
    config: Mapping[str, object] = {}


NO_DEFAULTS = GenerationDefaults()


def read_generation_defaults(folder: Path) -> GenerationDefaults:
    """The defaults of a folder, empty for files that it lacks; CheckpointError for an end token that is no integer."""
    generation, config = (
        read_json(folder / name) if (folder / name).is_file() else {} for name in (GENERATION, "config.json")
    )
    inner = config.get("text_config")  # the decoder of a multimodal model
    config = {**(inner if isinstance(inner, dict) else {}), **config}
    for name, values in ((GENERATION, generation), ("config.json", config)):
        ids = _listed(values.get(EOS))
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            raise CheckpointError(
                f"{folder / name}: {EOS}={values[EOS]!r} is neither a token's number nor a list of them"
            )
    settings = {name: value for name, value in generation.items() if name not in STALE}
    return GenerationDefaults(settings, {EOS: config[EOS]} if EOS in config else {})


def set_end_tokens(
    config: "ModelConfig | WrappedConfig",
    tokenizer: "PreTrainedTokenizerBase",
    defaults: GenerationDefaults = NO_DEFAULTS,
) -> None:
    """Set config.eos_token_ids to every token that ends a text, without repetition.

    In this order: those of the folder's files, those set before, the tokenizer's own, and the one that closes a turn.
    """
    of_tokenizer = [end_token(tokenizer), _turn_end(tokenizer)]
    candidates = [*end_token_ids(defaults), *config.eos_token_ids, *(i for i in of_tokenizer if i is not None)]
    # some files name ids beyond the vocabulary, which no model produces
    config.eos_token_ids = tuple(i for i in dict.fromkeys(candidates) if 0 <= i < config.vocab_size)


def end_token_ids(defaults: GenerationDefaults) -> list[int]:
    """The end tokens of both files of a folder."""
    return [*_listed(defaults.generation.get(EOS)), *_listed(defaults.config.get(EOS))]


def generation_config_values(
    config: "ModelConfig | WrappedConfig", token_ids: Mapping[str, int | None], defaults: GenerationDefaults
) -> dict[str, object]:
    """The values of generation_config.json for a folder that is written.

    They are what the model came with, completed by `token_ids` (bos_token_id, pad_token_id, ...) and all end tokens.
    """
    values = {name: i for name, i in token_ids.items() if i is not None} | dict(defaults.generation)
    ends = list(config.eos_token_ids)
    return {**values, EOS: ends[0] if len(ends) == 1 else ends} if ends else values


def _turn_end(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """`turn_end_token`, or None for a template that refuses a plain conversation or must be chosen by name."""
    try:
        return turn_end_token(tokenizer)
    except (UserError, ValueError):
        return None


def _listed(ends: object) -> list[object]:
    """eos_token_id as a list; files write one id, a list or null."""
    return [] if ends is None else list(ends) if isinstance(ends, list | tuple) else [ends]
