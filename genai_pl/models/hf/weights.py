"""Weights in and out: a Hugging Face folder becomes our model, our model becomes a Hugging Face folder."""

import logging
import operator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from genai_pl.config.enums import AttentionBackend, Shape
from genai_pl.config.model import ModelConfig
from genai_pl.errors import CheckpointError, ConfigError
from genai_pl.models.build import Model, build_model
from genai_pl.models.hf.config import generation_values, prefix_of, read_config, write_config
from genai_pl.models.hf.families import Weight
from genai_pl.models.hf.folder import TensorFiles, read_json, write_json, write_tensors
from genai_pl.models.hf.transformers_model import WrappedDecoder, save_wrapped

log = logging.getLogger(__name__)

START = "decoder_start_token_id"
MAX_SHARD_BYTES = 5 * 10**9


def load_pretrained(
    folder: Path,
    *,
    dtype: torch.dtype | None = torch.float32,
    attention: AttentionBackend = AttentionBackend.auto,
    dropout: float = 0.0,
) -> Model:
    """The model in evaluation mode that a Hugging Face folder holds; CheckpointError if it cannot be read.

    dtype: None leaves each tensor in the one it is stored in. attention and dropout are how it is to be run, which the
    folder does not say.
    """
    stored = TensorFiles(folder, prefix_of(folder / "config.json"))
    config, rows = read_config(folder / "config.json", stored)
    config = replace(_with_start(config, folder), attention=attention, dropout=dropout)
    table = []
    for row in rows:  # the first that is missing is told before more are built than there are
        stored.shape(row.hf_name)
        table.append(row)
    model = _without_memory(config, folder)
    for row in table:
        _check_shape(model, row, stored.shape(row.hf_name), folder)
    for row in table:
        tensor = stored.read(row.hf_name)
        _assign(model, row, tensor if dtype is None else tensor.to(dtype))
    model.tie_weights()
    _warn_of_unused(stored)
    return model.eval()


def stored_dtypes(folder: Path) -> dict[str, torch.dtype]:
    """What the tensors of a folder are stored in, by our names of them."""
    stored = TensorFiles(folder, prefix_of(folder / "config.json"))
    _, rows = read_config(folder / "config.json", stored)
    return {name: stored.dtype(row.hf_name) for row in rows for name in row.names}


def save_pretrained(
    model: Model | WrappedDecoder,
    folder: Path,
    *,
    token_ids: dict[str, int | None],
    generation: dict[str, object] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> str:
    """Write config.json, generation_config.json and model.safetensors; returns the name of the class that reads them.

    token_ids: bos_token_id, eos_token_id, pad_token_id; generation: what generation_config.json says, by default the
    same. A folder that must appear whole is written by `write_atomic`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if generation is None:
        generation = {name: i for name, i in token_ids.items() if i is not None}
    if isinstance(model, WrappedDecoder):
        reader = save_wrapped(model, folder)
        write_json(folder / "generation_config.json", generation)
        return reader
    values, table, reader = write_config(model.config, token_ids)
    dtype = str(model.embed.weight.dtype).removeprefix("torch.")
    write_json(folder / "config.json", {**values, "dtype": dtype})
    write_json(folder / "generation_config.json", {**generation_values(values, token_ids), **generation})
    state = model.state_dict()
    tensors = ((row.hf_name, _to_hf(state, row)) for row in table)
    write_tensors(tensors, folder, max_shard_bytes=max_shard_bytes)
    return reader


def _with_start(config: ModelConfig, folder: Path) -> ModelConfig:
    """The same with what a decoder begins with, where generation_config.json alone says it."""
    file = folder / "generation_config.json"
    start = read_json(file).get(START) if config.shape is Shape.encoder_decoder and file.is_file() else None
    if start is None or start == config.decoder_start_token_id:
        return config
    if config.decoder_start_token_id is not None:
        raise CheckpointError(f"{file}: {START}={start}, and config.json says {config.decoder_start_token_id}")
    if type(start) is not int or not 0 <= start < config.vocab_size:
        raise CheckpointError(f"{file}: {START}={start!r} is no token of the model")
    return replace(config, decoder_start_token_id=start)


def _without_memory(config: ModelConfig, folder: Path) -> Model:
    try:
        with torch.device("meta"):  # weights are drawn and stored nowhere: one tensor at a time is in memory twice
            return build_model(config)
    except (ConfigError, RuntimeError) as error:  # a tensor of more bytes than can be counted
        raise CheckpointError(f"{folder / 'config.json'}: {str(error).splitlines()[0]}") from None


def _check_shape(model: Model, row: Weight, shape: tuple[int, ...], folder: Path) -> None:
    """CheckpointError if a tensor of theirs has another shape than the configuration asks for."""
    parts = [operator.attrgetter(name)(model) for name in row.names]
    expected = row.to_hf(torch.empty(sum(len(part) for part in parts), *parts[0].shape[1:], device="meta")).shape
    if shape != expected:
        raise CheckpointError(
            f"{folder}: tensor {row.hf_name} has shape {list(shape)}, config.json asks for {list(expected)}"
        )


def _warn_of_unused(stored: TensorFiles) -> None:
    names = stored.unused()
    if names:
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        log.warning("%s: %s tensors have no place in this model and are left out: %s", stored.folder, len(names), shown)


def _assign(model: Model, row: Weight, tensor: Tensor) -> None:
    """Put one tensor of theirs where ours are."""
    owners = [model.get_submodule(name.rpartition(".")[0]) for name in row.names]
    leaves = [name.rpartition(".")[2] for name in row.names]
    before = [getattr(owner, leaf) for owner, leaf in zip(owners, leaves, strict=True)]
    rows = [len(old) for old in before]
    for owner, leaf, old, part in zip(owners, leaves, before, row.from_hf(tensor).split(rows), strict=True):
        part = part.clone() if len(rows) > 1 else part  # a part must not keep the whole alive, nor share its memory
        setattr(owner, leaf, nn.Parameter(part) if isinstance(old, nn.Parameter) else part)


def _to_hf(state: dict[str, Tensor], row: Weight) -> Tensor:
    """The tensor of theirs that holds these of ours."""
    parts = [state[name].detach().cpu() for name in row.names]
    return row.to_hf(parts[0] if len(parts) == 1 else torch.cat(parts)).clone()  # one of ours may be two of theirs
