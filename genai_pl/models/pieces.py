"""Checkpoints in pieces: a folder with a safetensors file per process, and one more for all that is no tensor.

Nothing in it is pickled but plain data: shapes and offsets lie in the headers of the safetensors files, which DCP reads.
"""

import warnings
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from genai_pl.errors import CheckpointError

SHAPES = "shapes"  # of all tensors, by name
WEIGHTS = {
    "state_dict": "",
    "current_model_state": "current.",
}  # the second beside means of weights; what their names begin with


def split(checkpoint: dict) -> tuple[dict[str, Tensor], dict]:
    """The tensors of weights and optimizers by name, and the checkpoint with those names in their places."""
    names: dict[Tensor, str] = {}  # a tied weight is written once

    def take(name: str, value: object) -> object:
        if not isinstance(value, Tensor):
            return value
        return names.setdefault(value, name) if value.ndim else value.detach().clone()

    rest = _replace(checkpoint, take)
    tensors = {name: value.detach() for value, name in names.items()}
    return tensors, {**rest, SHAPES: {name: list(value.shape) for name, value in tensors.items()}}


def join(folder: Path, rest: dict, places: Mapping[str, Tensor]) -> dict:
    """The checkpoint with its tensors: in pieces of this process where `places` has a DTensor of a name, whole elsewhere."""
    found = _found(folder)
    tensors = {name: _room(found[name], places.get(name)) for name in rest[SHAPES]}
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # that each process reads for itself
        dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    checkpoint = _replace(rest, lambda _, value: tensors[value] if isinstance(value, str) else value)
    del checkpoint[SHAPES]
    return checkpoint


def check(folder: Path, rest: dict) -> None:
    """CheckpointError unless every tensor is there, whole."""
    found = _found(folder)
    if SHAPES not in rest:
        raise CheckpointError(f"{folder}: refused, it does not list its tensors")
    for name, shape in rest[SHAPES].items():
        pieces = found[name].chunks if name in found else []
        if sum(prod(piece.sizes) for piece in pieces) != prod(shape):
            raise CheckpointError(f"{folder}: refused, a part of {name} is missing")


def _found(folder: Path) -> dict[str, TensorStorageMetadata]:
    try:
        return HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise CheckpointError(f"{folder}: refused, {str(error).splitlines()[0]}") from None


def _room(stored: TensorStorageMetadata, place: Tensor | None) -> Tensor:
    dtype = stored.properties.dtype
    if isinstance(place, DTensor) and place.shape == stored.size:
        return torch.empty_like(place.detach(), dtype=dtype)
    return torch.empty(stored.size, dtype=dtype)


def _replace(checkpoint: dict, replacement: Callable[[str, object], object]) -> dict:
    """The checkpoint with `replacement(name, value)` for each weight and each value of an optimizer's state."""
    weights = {
        kind: {name: replacement(prefix + name, value) for name, value in checkpoint[kind].items()}
        for kind, prefix in WEIGHTS.items()
        if kind in checkpoint
    }
    optimizers = []
    for i, optimizer in enumerate(checkpoint["optimizer_states"]):
        state = {
            n: {name: replacement(f"optimizer.{i}.{n}.{name}", value) for name, value in kept.items()}
            for n, kept in optimizer["state"].items()
        }
        optimizers.append({**optimizer, "state": state})
    return {**checkpoint, **weights, "optimizer_states": optimizers}
