"""Weights in and out: a Hugging Face folder becomes our model, our model becomes a Hugging Face folder."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from genai_pl.errors import CheckpointError
from genai_pl.models.build import Model, build_model
from genai_pl.models.families import Weight
from genai_pl.models.folder import tensor_reader, write_json, write_tensors
from genai_pl.models.hf_config import read_config, write_config
from genai_pl.models.wrapped import WrappedDecoder, save_wrapped
from genai_pl.names import AttentionBackend

MAX_SHARD_BYTES = 5 * 10**9


def load_pretrained(
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    attention: AttentionBackend = AttentionBackend.auto,
    dropout: float = 0.0,
) -> Model:
    """The model in evaluation mode that a Hugging Face folder holds; CheckpointError if it cannot be read.

    attention and dropout are how it is to be run, which the folder does not say.
    """
    config, table = read_config(folder / "config.json")
    config = replace(config, attention=attention, dropout=dropout)
    read = tensor_reader(folder)
    with torch.device("meta"):  # weights are drawn and stored nowhere: one tensor at a time is in memory twice
        model = build_model(config)
    for row in table:
        try:
            _assign(model, row, read(row.theirs, row.instead).to(dtype))
        except ValueError as error:
            raise CheckpointError(f"{folder}: {error}") from None
    model.tie_weights()
    return model.eval()


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
    values, table, reader = write_config(model.config)
    dtype = str(model.embed.weight.dtype).removeprefix("torch.")
    write_json(folder / "config.json", {**values, "dtype": dtype, **token_ids})
    write_json(folder / "generation_config.json", generation)
    state = model.state_dict()
    tensors = ((row.theirs, _join(state, row)) for row in table)
    write_tensors(tensors, folder, max_shard_bytes=max_shard_bytes)
    return reader


def _assign(model: Model, row: Weight, tensor: Tensor) -> None:
    """Put one tensor of theirs where ours are; ValueError if it has another shape than the configuration asks for."""
    owners = [model.get_submodule(name.rpartition(".")[0]) for name in row.ours]
    leaves = [name.rpartition(".")[2] for name in row.ours]
    before = [getattr(owner, leaf) for owner, leaf in zip(owners, leaves, strict=True)]
    shapes = [tensor.shape for tensor in before]
    rows = [shape[0] for shape in shapes]
    asked = row.write(torch.empty(sum(rows), *shapes[0][1:], device="meta")).shape
    if tensor.shape != asked:
        raise ValueError(f"tensor {row.theirs} has shape {list(tensor.shape)}, config.json asks for {list(asked)}")
    for owner, leaf, old, part in zip(owners, leaves, before, row.read(tensor).split(rows), strict=True):
        # a part must not keep the whole alive, nor share its memory
        part = part.clone() if len(rows) > 1 or row.skipped else part
        setattr(owner, leaf, nn.Parameter(part) if isinstance(old, nn.Parameter) else part)


def _join(state: dict[str, Tensor], row: Weight) -> Tensor:
    """The tensor of theirs that holds these of ours."""
    parts = [state[name].detach().cpu() for name in row.ours]
    return row.write(parts[0] if len(parts) == 1 else torch.cat(parts))
