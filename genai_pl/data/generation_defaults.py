"""Which tokens end a text of a model, and what else its folder says of writing."""

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

    from genai_pl.models.hf.transformers_model import WrappedConfig

GENERATION, EOS = "generation_config.json", "eos_token_id"
STALE = ("transformers_version", "_from_model_config", "_commit_hash")  # of whoever wrote the file


class GenerationDefaults(NamedTuple):
    """What a folder says of how its model writes: decoding here has its own options, folders made of it keep the values."""

    generation: Mapping[str, object] = {}  # generation_config.json
    config: Mapping[str, object] = {}  # eos_token_id of config.json, where it has one


NO_DEFAULTS = GenerationDefaults()


def read_generation_defaults(folder: Path) -> GenerationDefaults:
    """What the two files of a folder say, of those that there are; CheckpointError for an end that is no token."""
    generation, config = (
        read_json(folder / name) if (folder / name).is_file() else {} for name in (GENERATION, "config.json")
    )
    inner = config.get("text_config")  # a decoder beside others
    config = {**(inner if isinstance(inner, dict) else {}), **config}
    for name, values in ((GENERATION, generation), ("config.json", config)):
        ends = _listed(values.get(EOS))
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in ends):
            raise CheckpointError(
                f"{folder / name}: {EOS}={values[EOS]!r} is neither a token's number nor a list of them"
            )
    kept = {name: value for name, value in generation.items() if name not in STALE}
    return GenerationDefaults(kept, {EOS: config[EOS]} if EOS in config else {})


def set_end_tokens(
    config: "ModelConfig | WrappedConfig",
    tokenizer: "PreTrainedTokenizerBase",
    defaults: GenerationDefaults = NO_DEFAULTS,
) -> None:
    """Set eos_token_ids: those that the folder names, those set before, the tokenizer's own, and what closes a turn."""
    own = [end_token(tokenizer), _turn_end(tokenizer)]
    found = [*end_token_ids(defaults), *config.eos_token_ids, *(i for i in own if i is not None)]
    # a number beyond the vocabulary, as some files have, is never written
    config.eos_token_ids = tuple(i for i in dict.fromkeys(found) if 0 <= i < config.vocab_size)


def end_token_ids(defaults: GenerationDefaults) -> list[int]:
    """The tokens that end a text by both files."""
    return [*_listed(defaults.generation.get(EOS)), *_listed(defaults.config.get(EOS))]


def generation_config_values(
    config: "ModelConfig | WrappedConfig", token_ids: Mapping[str, int | None], defaults: GenerationDefaults
) -> dict[str, object]:
    """generation_config.json of a folder that is written: what it was, with all tokens that end a text of the model."""
    values = {name: i for name, i in token_ids.items() if i is not None} | dict(defaults.generation)
    ends = list(config.eos_token_ids)
    return {**values, EOS: ends[0] if len(ends) == 1 else ends} if ends else values


def _turn_end(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """None too for a template that a question and its answer do not fit, or that must be chosen by name."""
    try:
        return turn_end_token(tokenizer)
    except (UserError, ValueError):
        return None


def _listed(ends: object) -> list[object]:
    """eos_token_id as files have it: one, a list, or null."""
    return [] if ends is None else list(ends) if isinstance(ends, list | tuple) else [ends]
