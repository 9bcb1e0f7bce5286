"""One way to name a trained model, wherever it came from: a run folder, a .ckpt, a Hugging Face folder, a hub id, or auto."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from genai_pl import peft
from genai_pl.data.tokenizer import from_files, pretrained_tokenizer
from genai_pl.errors import CheckpointError, ConfigError
from genai_pl.files import is_checkpoint
from genai_pl.models.build import Model, build_model
from genai_pl.models.checkpoint import MARK, read_checkpoint
from genai_pl.models.folder import read_json
from genai_pl.models.hf_config import is_supported
from genai_pl.models.onnx_model import OnnxDecoder, OnnxEncoderDecoder, is_onnx, load_onnx
from genai_pl.models.pretrained import load_pretrained
from genai_pl.models.wrapped import WrappedDecoder, build_wrapped, load_wrapped
from genai_pl.models.wrapped_check import check
from genai_pl.names import AttentionBackend, Head
from genai_pl.peft.files import CONFIG as ADAPTER
from genai_pl.specs import ModelConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Loaded(NamedTuple):
    """A model in evaluation mode, its tokenizer, and the file or folder they were read from."""

    model: Model | WrappedDecoder | OnnxDecoder | OnnxEncoderDecoder
    tokenizer: "PreTrainedTokenizerBase"
    path: Path


def load(
    reference: str,
    *,
    dtype: torch.dtype = torch.float32,
    attention: AttentionBackend = AttentionBackend.auto,
    dropout: float = 0.0,
    wrap: bool = True,
    adapters: Sequence[str] = (),
    onnx: bool = False,
) -> Loaded:
    """The model and tokenizer that a reference stands for; CheckpointError says why it cannot be had.

    With `wrap`, a folder of no family of ours is run by transformers, with our attention. A run or folder with an
    adapter gives its base with the adapter; further `adapters` are put on top in their order. `onnx` takes ONNX graphs
    too, which can write and no more.
    """
    options = {"dtype": dtype, "attention": attention, "dropout": dropout, "wrap": wrap}
    path = resolve(reference)
    if is_onnx(path):
        return _load_onnx(path, allowed=onnx, adapters=adapters)
    if is_checkpoint(path):
        loaded = _load_checkpoint(path, **options)
    elif (path / ADAPTER).is_file():
        loaded = _load_with_adapter(path, **options)
    else:
        loaded = _load_folder(path, **options)
    for name in adapters:
        peft.load_adapter(loaded.model, resolve_adapter(name))
    return loaded._replace(model=loaded.model.eval())


def load_draft(reference: str | None, loaded: Loaded) -> Model | WrappedDecoder | None:
    """The model that proposes tokens to a loaded one, on its device; ConfigError if its tokens are others."""
    if reference is None:
        return None
    weight = loaded.model.embed.weight
    draft = load(reference, dtype=weight.dtype)
    if draft.tokenizer.get_vocab() != loaded.tokenizer.get_vocab():
        raise ConfigError(f"generation.draft={reference}: its tokenizer is another one than that of the checkpoint")
    return draft.model.to(weight.device)


def _load_onnx(path: Path, *, allowed: bool, adapters: Sequence[str]) -> Loaded:
    if not allowed:
        raise CheckpointError(f"{path}: an ONNX model, which generate.py and serve.py run; give the one it was made of")
    if adapters:
        raise ConfigError(f"{path}: an ONNX model takes no adapters; export it with one: format=onnx adapter=...")
    return Loaded(load_onnx(path), pretrained_tokenizer(str(path)), path)


def _load_folder(path: Path, *, dtype: torch.dtype, attention: AttentionBackend, dropout: float, wrap: bool) -> Loaded:
    if wrap and not is_supported(path / "config.json"):
        model = load_wrapped(str(path), dtype=dtype, attention=attention)
    else:
        model = load_pretrained(path, dtype=dtype, attention=attention, dropout=dropout)
    return Loaded(model, pretrained_tokenizer(str(path)), path)


def _load_with_adapter(path: Path, **options: object) -> Loaded:
    """The base that an adapter folder names, with the adapter and its tokenizer."""
    try:
        base = load(_base_of(path), **options)
    except RecursionError:
        raise CheckpointError(f"{path}: the base that {ADAPTER} names has it for its own base") from None
    if read_json(path / ADAPTER).get("task_type") == "SEQ_CLS":
        _score(base.model)
    tokenizer = pretrained_tokenizer(str(path)) if (path / "tokenizer.json").is_file() else base.tokenizer
    return Loaded(peft.load_adapter(base.model, path), tokenizer, path)


def _load_checkpoint(path: Path, *, dtype: torch.dtype, **options: object) -> Loaded:
    contents = read_checkpoint(path)
    ours = contents[MARK]
    prefix = "model."
    state = {k.removeprefix(prefix): v.to(dtype) for k, v in contents["state_dict"].items() if k.startswith(prefix)}
    base, adapter = ours.get("base"), ours.get("peft")
    try:
        if base is not None:  # the checkpoint holds the adapter alone
            model = load(base, dtype=dtype, **options).model
            if ours["model"].get("head") == Head.score.value:
                _score(model)
        else:
            model = _shell(ours["model"], options["attention"], options["dropout"])
        if adapter is not None:
            model = peft.METHODS[adapter["method"]].make(model, **adapter["options"])
        model.load_state_dict(state, assign=True, strict=base is None)
        tokenizer = from_files(ours["tokenizer"])
    except (ConfigError, KeyError, RuntimeError, AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: refused, {str(error).splitlines()[0]}") from None
    peft.tie_weights(model)
    if isinstance(model, WrappedDecoder) and base is None:
        check(model, str(path))
    return Loaded(model, tokenizer, path)


def _score(model: Model | WrappedDecoder) -> None:
    """Give a base the head that its adapter brings the weights of; the generator of the run draws nothing for it."""
    if not isinstance(model, WrappedDecoder) and model.config.head is not Head.score:
        with torch.random.fork_rng(devices=[]):
            model.set_head(Head.score)


def _base_of(folder: Path) -> str:
    """The model that an adapter belongs to, as its folder names it; a relative one is looked for beside the folder too."""
    name = str(read_json(folder / ADAPTER).get("base_model_name_or_path") or "")
    if not name:
        raise CheckpointError(f"{folder}: {ADAPTER} names no base_model_name_or_path: give the base as checkpoint=")
    return str(folder / name) if not Path(name).exists() and (folder / name).exists() else name


def _shell(stored: dict, attention: AttentionBackend, dropout: float) -> Model | WrappedDecoder:
    """The model that a checkpoint's configuration describes; one of ours has no memory for its weights yet."""
    if "wrapped" in stored:
        return build_wrapped(stored["wrapped"], attention=attention)
    with torch.device("meta"):
        return build_model(replace(ModelConfig.from_dict(stored), attention=attention, dropout=dropout))


def resolve(reference: str) -> Path:
    """The .ckpt or Hugging Face folder that a reference stands for."""
    if reference == "auto":
        return resolve(str(newest_run(Path("outputs"), Path("multirun"))))
    path = Path(reference)
    if is_checkpoint(path):
        return path
    if (path / "config.json").is_file() or (path / ADAPTER).is_file():
        return path
    if path.is_dir():
        return _of_run(path)
    if reference.count("/") == 1 and not reference.startswith((".", "/", "~")) and not path.suffix:
        return _from_hub(reference)
    raise CheckpointError(f"checkpoint={reference}: no such run folder, .ckpt file or Hugging Face folder")


def resolve_adapter(reference: str) -> Path:
    """The adapter folder that a folder or a run stands for."""
    for path in (Path(reference), Path(reference) / "adapter"):
        if (path / ADAPTER).is_file():
            return path
    raise CheckpointError(f"adapter={reference}: no {ADAPTER} in this folder, nor in its adapter/")


def newest_run(*roots: Path) -> Path:
    """The run folder under the roots whose model or checkpoint was written last."""
    names = ("checkpoints/last.ckpt", "model/config.json", f"adapter/{ADAPTER}")
    found = [p for root in roots for name in names for p in root.rglob(name)]
    if not found:
        raise CheckpointError(f"checkpoint=auto: no finished run under {' or '.join(map(str, roots))}; train one first")
    return max(found, key=lambda path: path.stat().st_mtime_ns).parent.parent


def _of_run(folder: Path) -> Path:
    """The exported adapter or model, unless the run has gone on since."""
    last = folder / "checkpoints" / "last.ckpt"
    for exported in (folder / "adapter" / ADAPTER, folder / "model" / "config.json"):
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
