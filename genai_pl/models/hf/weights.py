"""Weights: a Hugging Face folder becomes our model, and our model becomes a Hugging Face folder.

Loading assigns, it does not copy: the model is built on the meta device and gets each tensor of the file as a parameter, so
that the peak of memory is the model plus one tensor. All names and shapes are compared before the first tensor is read.
"""

import logging
import operator
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from genai_pl.config.enums import AttentionBackend, Shape
from genai_pl.config.model import ModelConfig
from genai_pl.errors import CheckpointError, ConfigError
from genai_pl.models.build import Model, build_empty
from genai_pl.models.hf.config import generation_values, prefix_of, read_config, write_config
from genai_pl.models.hf.families import Weight
from genai_pl.models.hf.folder import TensorFiles, read_json, write_json, write_tensors
from genai_pl.models.hf.transformers_model import WrappedDecoder, save_wrapped

log = logging.getLogger(__name__)

START = "decoder_start_token_id"
MAX_SHARD_BYTES = 5 * 10**9


class StoredTensors(Protocol):
    """Tensors of files by the names of a table, read one at a time. folder: what is named in messages."""

    folder: Path

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor; CheckpointError if it is missing."""

    def read(self, name: str) -> Tensor:
        """The tensor of this name."""

    def unused(self) -> list[str]:
        """Names of tensors that were not read."""


def load_pretrained(
    folder: Path,
    *,
    dtype: torch.dtype | None = torch.float32,
    attention: AttentionBackend = AttentionBackend.auto,
    dropout: float = 0.0,
) -> Model:
    """The model of a Hugging Face folder, in evaluation mode; CheckpointError if it cannot be read.

    dtype: that of all weights; None keeps the stored one of each tensor. attention, dropout: how the model runs, which a
    folder does not state.
    """
    # the configuration and the table of its weights, compared with the headers of the files
    stored = TensorFiles(folder, prefix_of(folder / "config.json"))
    config, rows = read_config(folder / "config.json", stored)
    config = replace(_with_start(config, folder), attention=attention, dropout=dropout)
    return load_tensors(config, rows, stored, folder / "config.json", dtype=dtype)


def load_tensors(
    config: ModelConfig, rows: Iterable[Weight], stored: StoredTensors, file: Path, *, dtype: torch.dtype | None
) -> Model:
    """The model of a configuration with the tensors of its table, in evaluation mode; CheckpointError where they do not fit.

    file: what the configuration was read from, for messages. dtype: as in `load_pretrained`.
    """
    table = []
    for row in rows:  # a missing tensor is an error here, before a model of a million layers is built
        stored.shape(row.hf_name)
        table.append(row)
    model = _without_memory(config, file)
    for row in table:
        _check_shape(model, row, stored.shape(row.hf_name), file)
    # the weights, one tensor at a time
    for row in table:
        tensor = stored.read(row.hf_name)
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            raise CheckpointError(
                f"{file.parent}: tensor {row.hf_name} holds codes ({tensor.dtype}) without their scales"
            )
        _assign(model, row, tensor if dtype is None else tensor.to(dtype))
    model.tie_weights()
    _warn_of_unused(stored)
    return model.eval()


def stored_dtypes(folder: Path) -> dict[str, torch.dtype]:
    """The dtype in which a folder stores each tensor, by our names."""
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
    """Write config.json, generation_config.json and the weights; returns the name of the class that reads them.

    token_ids: bos_token_id, eos_token_id, pad_token_id of the tokenizer. generation: the content of
    generation_config.json, by default the token ids. max_shard_bytes: a larger model is written in shards with an index.
    The folder is not atomic: a caller that needs that uses `write_atomic`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if generation is None:
        generation = {name: i for name, i in token_ids.items() if i is not None}
    if isinstance(model, WrappedDecoder):
        class_name = save_wrapped(model, folder)
        write_json(folder / "generation_config.json", generation)
        return class_name
    values, table, class_name = write_config(model.config, token_ids)
    dtype = str(model.embed.weight.dtype).removeprefix("torch.")
    write_json(folder / "config.json", {**values, "dtype": dtype})
    write_json(folder / "generation_config.json", {**generation_values(values, token_ids), **generation})
    state = model.state_dict()
    tensors = ((row.hf_name, stored_tensor(state, row)) for row in table)
    write_tensors(tensors, folder, max_shard_bytes=max_shard_bytes)
    return class_name


def _with_start(config: ModelConfig, folder: Path) -> ModelConfig:
    """The configuration with decoder_start_token_id from generation_config.json, where config.json has none (newer T5)."""
    file = folder / "generation_config.json"
    start = read_json(file).get(START) if config.shape is Shape.encoder_decoder and file.is_file() else None
    if start is None or start == config.decoder_start_token_id:
        return config
    if config.decoder_start_token_id is not None:
        raise CheckpointError(f"{file}: {START}={start}, and config.json says {config.decoder_start_token_id}")
    if type(start) is not int or not 0 <= start < config.vocab_size:
        raise CheckpointError(f"{file}: {START}={start!r} is no token of the model")
    return replace(config, decoder_start_token_id=start)


def _without_memory(config: ModelConfig, file: Path) -> Model:
    """The model on the meta device."""
    try:
        return build_empty(config)
    except (ConfigError, RuntimeError) as error:  # a tensor of more bytes than can be counted
        raise CheckpointError(f"{file}: {str(error).splitlines()[0]}") from None


def _check_shape(model: Model, row: Weight, shape: tuple[int, ...], file: Path) -> None:
    """CheckpointError if a stored tensor has another shape than our tensors, joined and in the file's layout."""
    parts = [operator.attrgetter(name)(model) for name in row.names]
    parts = parts if row.expert is None else [part[row.expert] for part in parts]
    expected = row.to_hf(torch.empty(sum(len(part) for part in parts), *parts[0].shape[1:], device="meta")).shape
    if shape != expected:
        raise CheckpointError(
            f"{file.parent}: tensor {row.hf_name} has shape {list(shape)}, {file.name} asks for {list(expected)}"
        )


def _warn_of_unused(stored: StoredTensors) -> None:
    """Log the tensors of the folder that the model has no place for."""
    names = stored.unused()
    if names:
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        log.warning("%s: %s tensors have no place in this model and are left out: %s", stored.folder, len(names), shown)


def _assign(model: Model, row: Weight, tensor: Tensor) -> None:
    """Make one stored tensor the parameters that it holds: GPT-2's c_attn is q, k and v."""
    owners = [model.get_submodule(name.rpartition(".")[0]) for name in row.names]
    leaves = [name.rpartition(".")[2] for name in row.names]
    before = [getattr(owner, leaf) for owner, leaf in zip(owners, leaves, strict=True)]
    if row.expert is not None:
        _assign_slice(owners[0], leaves[0], row, tensor)
        return
    rows = [len(old) for old in before]
    for owner, leaf, old, part in zip(owners, leaves, before, row.from_hf(tensor).split(rows), strict=True):
        part = part.clone() if len(rows) > 1 else part  # a view would keep the whole tensor alive
        setattr(owner, leaf, nn.Parameter(part) if isinstance(old, nn.Parameter) else part)


def _assign_slice(owner: nn.Module, leaf: str, row: Weight, tensor: Tensor) -> None:
    """Copy the matrix of one expert into the 3-D parameter of all, which gets memory at the first."""
    old = getattr(owner, leaf)
    if old.is_meta:
        setattr(owner, leaf, nn.Parameter(torch.empty(old.shape, dtype=tensor.dtype)))
    getattr(owner, leaf).data[row.expert] = row.from_hf(tensor)


def stored_tensor(state: dict[str, Tensor], row: Weight) -> Tensor:
    """The tensor of a row as its file stores it, joined from ours."""
    parts = [state[name].detach() for name in row.names]
    parts = [(part if row.expert is None else part[row.expert]).cpu() for part in parts]
    return row.to_hf(
        parts[0] if len(parts) == 1 else torch.cat(parts)
    ).clone()  # safetensors refuses two names of one memory
