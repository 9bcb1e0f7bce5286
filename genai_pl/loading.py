"""Loading: a trained model and its tokenizer from any reference.

A reference is a run folder, a .ckpt, a Hugging Face folder, an adapter folder, an ONNX folder, a GGUF file, a hub id, or "auto".
`references.resolve` finds the path; `load` decides by its content. Everything is read as data: no pickled code, no remote code.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from genai_pl import peft
from genai_pl.atomic_io import ADAPTER, is_checkpoint, is_gguf
from genai_pl.checkpoints.file import MARK, read_checkpoint
from genai_pl.config.enums import AttentionBackend, Head
from genai_pl.config.labels import read_labels
from genai_pl.config.model import ModelConfig
from genai_pl.data.generation_defaults import (
    GENERATION,
    NO_DEFAULTS,
    GenerationDefaults,
    read_generation_defaults,
    set_end_tokens,
)
from genai_pl.data.gguf_read import end_ids, tokenizer_from_metadata
from genai_pl.data.tokenizer import pretrained_tokenizer, tokenizer_from_files
from genai_pl.devices import CODES
from genai_pl.errors import CheckpointError, ConfigError
from genai_pl.models.build import Model, build_empty
from genai_pl.models.fused_decode import prepare_for_decoding
from genai_pl.models.gguf.reader import GgufFile, load_gguf, stored_gguf_dtypes
from genai_pl.models.hf.config import check_blocks, is_supported, read_config
from genai_pl.models.hf.folder import TensorFiles, read_json
from genai_pl.models.hf.transformers_check import check
from genai_pl.models.hf.transformers_model import WrappedDecoder, build_wrapped, load_wrapped
from genai_pl.models.hf.weights import load_pretrained
from genai_pl.models.hf.weights import stored_dtypes as stored_of_folder
from genai_pl.models.onnx.model import OnnxDecoder, OnnxEncoderDecoder, is_onnx, load_onnx
from genai_pl.plugins import ADVICE
from genai_pl.references import resolve, resolve_adapter

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class _Loaded(NamedTuple):
    """The fields of `Loaded`; a NamedTuple itself cannot have a further attribute that is not unpacked."""

    model: Model | WrappedDecoder | OnnxDecoder | OnnxEncoderDecoder
    tokenizer: "PreTrainedTokenizerBase"
    path: Path


class Loaded(_Loaded):
    """A loaded model, unpacked as `model, tokenizer, path = load(...)`.

    model: in evaluation mode. path: the file or folder that it was read from.
    defaults: generation defaults of that folder, an attribute beside the three.
    """

    defaults: GenerationDefaults = NO_DEFAULTS

    def __new__(cls, *parts: object, defaults: GenerationDefaults = NO_DEFAULTS, **fields: object) -> "Loaded":
        loaded = super().__new__(cls, *parts, **fields)
        loaded.defaults = defaults
        return loaded

    def _replace(self, **changes: object) -> "Loaded":
        return Loaded(**{**self._asdict(), **changes}, defaults=self.defaults)


def load(
    reference: str,
    *,
    dtype: torch.dtype = torch.float32,
    attention: AttentionBackend = AttentionBackend.auto,
    dropout: float = 0.0,
    wrap: bool = True,
    adapters: Sequence[str] = (),
    onnx: bool = False,
    option: str = "checkpoint",
    above: tuple[Path, ...] = (),
    rows: int = 1,
) -> Loaded:
    """The model and tokenizer of a reference, in evaluation mode; CheckpointError gives the reason if there is none.

    dtype: of the weights; int8, int4: packed for products on a CPU, of a model without adapters (`prepare_for_decoding`).
    attention: backend, see `AttentionBackend`. dropout: probability while training.
    wrap: allow models of other families, which transformers runs with our attention.
    adapters: references of adapters that are put on top, in this order. onnx: allow ONNX folders, which can only generate.
    option: name of the option that held the reference, for messages.
    above: adapter folders that lead to this base, against a cycle of bases.
    rows: tokens of a typical pass, for which int8 and int4 are packed.

    An adapter folder, and a run with one, give the base with the adapter.
    """
    if dtype in CODES.values():
        loaded = load(
            reference, attention=attention, wrap=wrap, adapters=adapters, onnx=onnx, option=option, above=above
        )
        prepare_for_decoding(loaded.model, dtype, rows=rows)
        return loaded
    options = {"dtype": dtype, "attention": attention, "dropout": dropout, "wrap": wrap}
    # find the path, and refuse an adapter that is its own base
    path = resolve(reference, option=option)
    if path.resolve() in above:
        raise CheckpointError(f"{path}: an adapter whose base is itself; give the base as checkpoint=, with adapter=")
    above = (*above, path.resolve())
    # the content of the path decides how it is read
    if is_onnx(path):
        return _load_onnx(path, allowed=onnx, adapters=adapters)
    if is_gguf(path):
        loaded = _load_gguf(path, dtype=dtype, attention=attention, dropout=dropout)
    elif is_checkpoint(path):
        loaded = _load_checkpoint(path, above, **options)
    elif (path / ADAPTER).is_file():
        loaded = _load_with_adapter(path, above, **options)
    else:
        loaded = _load_folder(path, **options)
    # further adapters on top
    for name in adapters:
        folder = resolve_adapter(name)
        refuse_twice(path, folder, message=f"adapter={name}: {option}={reference}")
        peft.load_adapter(loaded.model, folder)
        set_end_tokens(loaded.model.config, loaded.tokenizer, read_generation_defaults(folder))
    return loaded._replace(model=loaded.model.eval())


def load_draft(reference: str | None, loaded: Loaded) -> Model | WrappedDecoder | None:
    """The draft model of speculative decoding, on the target's device and in its dtype; None for no reference.

    ConfigError if its vocabulary is not that of the target: draft tokens are passed on as ids.
    """
    if reference is None:
        return None
    weight = loaded.model.embed.weight
    draft = load(reference, dtype=weight.dtype, option="generation.draft")
    if draft.tokenizer.get_vocab() != loaded.tokenizer.get_vocab():
        raise ConfigError(f"generation.draft={reference}: its tokenizer is another one than that of the checkpoint")
    return draft.model.to(weight.device)


def _load_onnx(path: Path, *, allowed: bool, adapters: Sequence[str]) -> Loaded:
    """An ONNX folder; CheckpointError for commands that need more than decoding."""
    if not allowed:
        raise CheckpointError(f"{path}: an ONNX model, which generate.py and serve.py run; give the one it was made of")
    if adapters:
        raise ConfigError(f"{path}: an ONNX model takes no adapters; export it with one: format=onnx adapter=...")
    return _with_end_tokens(load_onnx(path), pretrained_tokenizer(str(path)), path, read_generation_defaults(path))


def _load_folder(path: Path, *, dtype: torch.dtype, attention: AttentionBackend, dropout: float, wrap: bool) -> Loaded:
    """A Hugging Face folder, as a model of ours or, with `wrap`, run by transformers."""
    if wrap and not _is_ours(path / "config.json"):
        model = load_wrapped(str(path), dtype=dtype, attention=attention)
    else:
        model = load_pretrained(path, dtype=dtype, attention=attention, dropout=dropout)
    return _with_end_tokens(model, pretrained_tokenizer(str(path)), path, read_generation_defaults(path))


def _load_gguf(path: Path, *, dtype: torch.dtype, attention: AttentionBackend, dropout: float) -> Loaded:
    """A GGUF file, with the tokenizer in it, or that of a tokenizer.json beside it."""
    stored = GgufFile(path)
    model = load_gguf(stored, dtype=dtype, attention=attention, dropout=dropout)
    tokenizer, ends = _gguf_tokenizer(stored), end_ids(stored.keys)
    return _with_end_tokens(model, tokenizer, path, GenerationDefaults(config={"eos_token_id": ends} if ends else {}))


def _gguf_tokenizer(stored: GgufFile) -> "PreTrainedTokenizerBase":
    """The tokenizer of a tokenizer.json beside a GGUF file, else that in it."""
    folder = stored.folder.parent
    if (folder / "tokenizer.json").is_file():
        return pretrained_tokenizer(str(folder))
    try:
        return tokenizer_from_metadata(stored.keys)
    except CheckpointError as error:
        raise CheckpointError(f"{stored.folder}: {error}") from None


def describe_gguf(path: Path) -> tuple[ModelConfig, "PreTrainedTokenizerBase"]:
    """Configuration and tokenizer of a GGUF file, without its weights."""
    stored = GgufFile(path)
    return stored.description()[0], _gguf_tokenizer(stored)


def _is_ours(file: Path) -> bool:
    """True if config.json describes a model of a family of ours, without features that ours lack.

    False for a causal LM with such a feature: transformers can run it. Others raise CheckpointError, since nothing can.
    """
    if not is_supported(file):
        return False
    try:
        read_config(file)
    except CheckpointError as error:
        if not any(
            str(name).endswith(("ForCausalLM", "LMHeadModel")) for name in read_json(file).get("architectures") or ()
        ):
            raise
        log.info("model       %s: transformers runs it", error)
        return False
    return True


def _with_end_tokens(
    model: nn.Module, tokenizer: "PreTrainedTokenizerBase", path: Path, defaults: GenerationDefaults
) -> Loaded:
    """The result, after the model is given the ids that end its texts: of tokenizer, config and defaults."""
    set_end_tokens(model.config, tokenizer, defaults)
    return Loaded(model, tokenizer, path, defaults=defaults)


def _load_with_adapter(path: Path, above: tuple[Path, ...], **options: object) -> Loaded:
    """The base that an adapter folder names, with the adapter, and the folder's tokenizer if it has one."""
    base = load(base_of(path), above=above, **options)
    peft.add_label_head(base.model, path)
    tokenizer = pretrained_tokenizer(str(path)) if (path / "tokenizer.json").is_file() else base.tokenizer
    own = read_generation_defaults(path) if (path / GENERATION).is_file() else base.defaults
    return _with_end_tokens(peft.load_adapter(base.model, path), tokenizer, path, own)


def _load_checkpoint(path: Path, above: tuple[Path, ...], *, dtype: torch.dtype, **options: object) -> Loaded:
    """A training checkpoint, a file or a sharded folder; one of an adapter run holds the adapter alone."""
    contents = read_checkpoint(path)
    ours = contents[MARK]
    base, adapter, prefix = ours.get("base"), ours.get("peft"), "model."
    try:
        state = {k.removeprefix(prefix): v.to(dtype) for k, v in contents["state_dict"].items() if k.startswith(prefix)}
        # the model: its base loaded from elsewhere, or built on the meta device for the weights
        if base is not None:  # the state_dict has the adapter's keys only
            model = load(base, dtype=dtype, above=above, **options).model
            _set_stored_head(model, ours["model"])
        else:
            model = _empty_model(ours["model"], state, options["attention"], options["dropout"])
        if adapter is not None:
            model = peft.METHODS[adapter["method"]].make(model, **adapter["options"])
        # weights are assigned, not copied: there is never a second copy in memory
        model.load_state_dict(state, assign=True, strict=base is None)
        ends = (*ours["model"].get("eos_token_ids", ()), *model.config.eos_token_ids)  # the run's, and its base's
        model.config.eos_token_ids = tuple(int(i) for i in ends)
        defaults = GenerationDefaults(**ours.get("defaults", {}))
        peft.tie_weights(model)
        loaded = _with_end_tokens(model, tokenizer_from_files(ours["tokenizer"]), path, defaults)
    except KeyError as error:
        advice = ADVICE if adapter is not None and error.args[0] == adapter.get("method") else ""
        raise CheckpointError(f"{path}: refused, {error.args[0]} is missing or not known{advice}") from None
    except (ConfigError, RuntimeError, AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: refused, {(str(error) or type(error).__name__).splitlines()[0]}") from None
    if isinstance(model, WrappedDecoder) and base is None:
        check(model, str(path))
    return loaded


def stored_dtypes(reference: str) -> dict[str, torch.dtype]:
    """{our parameter name: dtype} as the weights of a reference are stored; under an adapter, those of the base."""
    path = resolve(reference)
    if is_gguf(path):
        return stored_gguf_dtypes(GgufFile(path))
    if is_checkpoint(path):
        contents = read_checkpoint(path)
        base, prefix = contents[MARK].get("base"), "model."
        named = {name.removeprefix(prefix): x.dtype for name, x in contents["state_dict"].items()}
        return named if base is None else stored_dtypes(base)
    if (path / ADAPTER).is_file():
        return stored_dtypes(base_of(path))
    if is_supported(path / "config.json"):
        return stored_of_folder(path)
    stored = TensorFiles(path)
    return {f"inner.{name}": stored.dtype(name) for name in stored.weights()}


def refuse_twice(path: Path, adapter: Path, *, message: str) -> None:
    """ConfigError for an adapter that the loaded model has already: the folder itself, or that of the checkpoint's run."""
    path = path.resolve()
    if adapter.resolve() in (path, path.parent.parent / "adapter" if is_checkpoint(path) else path):
        raise ConfigError(f"{message} brings it already; leave one of them out")


def _set_stored_head(model: Model | WrappedDecoder, stored: dict) -> None:
    """Give a base the head for labels that a checkpoint's configuration describes; the global generator is not advanced."""
    head = stored.get("head")
    if head not in (Head.score.value, Head.tokens.value) or isinstance(model, WrappedDecoder):
        return
    extra = stored.get("extra") or {}
    labels = read_labels(extra, stored.get("n_labels", 1)) if "id2label" in extra else None
    with torch.random.fork_rng(devices=[]):
        model.set_head(Head(head), labels)


def base_of(folder: Path) -> str:
    """The reference of an adapter folder's base; a relative path may also be relative to the folder."""
    name = str(read_json(folder / ADAPTER).get("base_model_name_or_path") or "")
    if not name:
        raise CheckpointError(f"{folder}: {ADAPTER} names no base_model_name_or_path: give the base as checkpoint=")
    return str(folder / name) if not Path(name).exists() and (folder / name).exists() else name


def _empty_model(
    stored: dict, weights: Mapping[str, torch.Tensor], attention: AttentionBackend, dropout: float
) -> Model | WrappedDecoder:
    """The model that a checkpoint's configuration describes; ours is on the meta device, without memory for its weights."""
    if "wrapped" in stored:
        return build_wrapped(stored["wrapped"], weights, attention=attention)
    config = replace(ModelConfig.from_dict(stored), attention=attention, dropout=dropout)
    check_blocks(config, weights)
    return build_empty(config)
