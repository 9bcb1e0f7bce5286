"""Checkpoints in pieces: a folder with a safetensors file per process, and one more for all that is no tensor.

Nothing in it is pickled but plain data: shapes and offsets lie in the headers of the safetensors files, which DCP reads.
"""

import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from math import prod
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor

from genai_pl.atomic_io import CONTENTS, commit, open_temporary
from genai_pl.errors import CheckpointError, TrainingError, reason_of, system_error

SHAPES = "shapes"  # of all tensors, by name
WEIGHTS = {
    "state_dict": "",
    "current_model_state": "current.",
}  # the second beside means of weights; what their names begin with


def split_tensors(checkpoint: dict) -> tuple[dict[str, Tensor], dict]:
    """The tensors of weights and optimizers by name, and the checkpoint with those names in their templates."""
    names: dict[Tensor, str] = {}  # a tied weight is written once

    def name_of(name: str, value: object) -> object:
        if not isinstance(value, Tensor):
            return value
        return names.setdefault(value, name) if value.ndim else value.detach().clone()

    rest = _replace(checkpoint, name_of)
    tensors = {name: value.detach() for value, name in names.items()}
    return tensors, {**rest, SHAPES: {name: list(value.shape) for name, value in tensors.items()}}


def load_shards(folder: Path, rest: dict, templates: Mapping[str, Tensor]) -> dict:
    """The checkpoint with its tensors: in pieces of this process where `templates` has a DTensor of a name, whole elsewhere."""
    stored = _stored_tensors(folder)
    tensors = {name: _empty_tensor(stored[name], templates.get(name)) for name in rest[SHAPES]}
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # that each process reads for itself
        dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    checkpoint = _replace(rest, lambda _, value: tensors[value] if isinstance(value, str) else value)
    del checkpoint[SHAPES]
    return checkpoint


def check_shards(folder: Path, rest: dict) -> None:
    """CheckpointError unless every tensor is there, whole."""
    stored = _stored_tensors(folder)
    if SHAPES not in rest:
        raise CheckpointError(f"{folder}: refused, it does not list its tensors")
    for name, shape in rest[SHAPES].items():
        chunks = stored[name].chunks if name in stored else []
        if sum(prod(chunk.sizes) for chunk in chunks) != prod(shape):
            raise CheckpointError(f"{folder}: refused, a part of {name} is missing")


def _stored_tensors(folder: Path) -> dict[str, TensorStorageMetadata]:
    try:
        return HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise CheckpointError(f"{folder}: refused, {str(error).splitlines()[0]}") from None


def _empty_tensor(stored: TensorStorageMetadata, template: Tensor | None) -> Tensor:
    dtype = stored.properties.dtype
    if isinstance(template, DTensor) and template.shape == stored.size:
        return torch.empty_like(template.detach(), dtype=dtype)
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
            n: {name: replacement(f"optimizer.{i}.{n}.{name}", value) for name, value in values.items()}
            for n, values in optimizer["state"].items()
        }
        optimizers.append({**optimizer, "state": state})
    return {**checkpoint, **weights, "optimizer_states": optimizers}


class ShardedWriter(HuggingFaceStorageWriter):
    """safetensors files under a temporary name, which the first process renames when all have written theirs."""

    def __init__(self, temporary: Path, path: Path, on_commit: Callable[[Path], None]) -> None:
        super().__init__(str(temporary), save_distributed=True)
        self.target, self.on_commit = path, on_commit

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        commit(Path(self.path), self.target)
        self.on_commit(self.target)


class ShardedSaver:
    """Writes one checkpoint at a time; all processes must call its methods."""

    def __init__(self, *, asynchronous: bool) -> None:
        self.asynchronous = asynchronous  # go on while a copy in RAM is being written
        self._group = dist.new_group(backend="gloo")  # what a write says must not mix with what the run says
        self._pending: Future | None = None
        self._path = Path()

    def save(self, checkpoint: dict, path: Path, on_commit: Callable[[Path], None]) -> None:
        """Write the checkpoint as a folder, after the one before; TrainingError if that, or this one, went wrong."""
        self.wait()
        self._path = path
        tensors, rest = split_tensors(checkpoint)
        temporary: list[Path | None] = [None]
        if dist.get_rank() == 0:
            temporary = [open_temporary(path)]
            temporary[0].mkdir()
            torch.save(rest, temporary[0] / CONTENTS)
        dist.broadcast_object_list(temporary, group=self._group)
        options = {"storage_writer": ShardedWriter(temporary[0], path, on_commit), "process_group": self._group}
        if self.asynchronous:
            self._pending = dcp.async_save(tensors, **options)
            return
        try:
            dcp.save(tensors, **options)
        except CheckpointException as error:
            raise self._as_training_error(error) from error

    def wait(self) -> None:
        """Return when nothing is being written any more; TrainingError if it went wrong."""
        writing, self._pending = self._pending, None
        try:
            if writing is not None:
                writing.result()
        except CheckpointException as error:
            raise self._as_training_error(error) from error

    def _as_training_error(self, error: CheckpointException) -> TrainingError:
        causes = [cause for cause, _ in error.failures.values()]
        refused = next(filter(None, map(system_error, causes)), None)
        reason = reason_of(refused) if refused else str(causes[0]).splitlines()[0]
        return TrainingError(f"{self._path}: the checkpoint could not be written, {reason}")
