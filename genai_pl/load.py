"""One way to name a trained model, wherever it came from: a run folder, a .ckpt, a Hugging Face folder, a hub id, or auto."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from genai_pl.data.tokenizer import from_files, pretrained_tokenizer
from genai_pl.errors import CheckpointError, ConfigError
from genai_pl.models.build import Model, build_model
from genai_pl.models.checkpoint import MARK, read_checkpoint
from genai_pl.models.hf_config import is_supported
from genai_pl.models.pretrained import load_pretrained
from genai_pl.models.wrapped import WrappedDecoder, build_wrapped, load_wrapped
from genai_pl.names import AttentionBackend
from genai_pl.specs import ModelConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Loaded(NamedTuple):
    """A model in evaluation mode, its tokenizer, and the file or folder they were read from."""

    model: Model | WrappedDecoder
    tokenizer: "PreTrainedTokenizerBase"
    path: Path


def load(
    reference: str,
    *,
    dtype: torch.dtype = torch.float32,
    attention: AttentionBackend = AttentionBackend.auto,
    dropout: float = 0.0,
    wrap: bool = True,
) -> Loaded:
    """The model and tokenizer that a reference stands for; CheckpointError says why it cannot be had.

    With `wrap`, a folder of no family of ours is run by transformers, with our attention.
    """
    path = resolve(reference)
    if path.is_dir() and wrap and not is_supported(path / "config.json"):
        return Loaded(load_wrapped(str(path), dtype=dtype, attention=attention), pretrained_tokenizer(str(path)), path)
    if path.is_dir():
        model = load_pretrained(path, dtype=dtype, attention=attention, dropout=dropout)
        return Loaded(model, pretrained_tokenizer(str(path)), path)
    contents = read_checkpoint(path)
    ours = contents[MARK]
    try:
        model = _shell(ours["model"], attention, dropout)
        prefix = "model."
        state = {k.removeprefix(prefix): v.to(dtype) for k, v in contents["state_dict"].items() if k.startswith(prefix)}
        model.load_state_dict(state, assign=True)
    except (ConfigError, KeyError, RuntimeError, AttributeError) as error:
        raise CheckpointError(f"{path}: refused, {str(error).splitlines()[0]}") from None
    model.tie_weights()
    return Loaded(model.eval(), from_files(ours["tokenizer"]), path)


def _shell(stored: dict, attention: AttentionBackend, dropout: float) -> Model | WrappedDecoder:
    """The model that a checkpoint's configuration describes; one of ours has no memory for its weights yet."""
    if "wrapped" in stored:
        return build_wrapped(stored["wrapped"], attention=attention)
    with torch.device("meta"):
        return build_model(replace(ModelConfig.from_dict(stored), attention=attention, dropout=dropout))


def resolve(reference: str) -> Path:
    """The .ckpt file or Hugging Face folder that a reference stands for."""
    if reference == "auto":
        return resolve(str(newest_run(Path("outputs"), Path("multirun"))))
    path = Path(reference)
    if path.is_file():
        return path
    if (path / "config.json").is_file():
        return path
    if path.is_dir():
        return _of_run(path)
    if reference.count("/") == 1 and not reference.startswith((".", "/", "~")) and not path.suffix:
        return _from_hub(reference)
    raise CheckpointError(f"checkpoint={reference}: no such run folder, .ckpt file or Hugging Face folder")


def newest_run(*roots: Path) -> Path:
    """The run folder under the roots whose model or checkpoint was written last."""
    found = [p for root in roots for name in ("checkpoints/last.ckpt", "model/config.json") for p in root.rglob(name)]
    if not found:
        raise CheckpointError(f"checkpoint=auto: no finished run under {' or '.join(map(str, roots))}; train one first")
    return max(found, key=lambda path: path.stat().st_mtime_ns).parent.parent


def _of_run(folder: Path) -> Path:
    """The exported model, unless the run has gone on since."""
    exported, last = folder / "model" / "config.json", folder / "checkpoints" / "last.ckpt"
    if exported.exists() and not (last.exists() and last.stat().st_mtime > exported.stat().st_mtime + 60):
        return exported.parent
    if last.exists():
        return last
    raise CheckpointError(f"checkpoint={folder}: neither model/config.json nor checkpoints/last.ckpt in this folder")


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"checkpoint={name}: not here, and not from the hub ({reason})") from None
