"""Sharded checkpoints: a folder with a safetensors file per rank, and `contents.pt` for what is no tensor.

torch's DCP (distributed checkpoint) writes and reads the safetensors files; shapes and offsets of shards are in their
headers, so no metadata is pickled. `contents.pt` is the checkpoint with each tensor replaced by its name, and
`shapes`, the list of all names with their full shapes, by which a missing shard is noticed.

Each rank writes what it holds and reads what it needs, so neither time nor memory of a save grows with the full model,
and any number of ranks may load what another number wrote.
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

from genai_pl.atomic_io import CONTENTS, commit, open_temporary
from genai_pl.distributed.dtensor import is_dtensor
from genai_pl.errors import CheckpointError, TrainingError, reason_of, system_error

SHAPES = "shapes"  # of all tensors, by name
WEIGHTS = {
    "state_dict": "",
    "current_model_state": "current.",
}  # the second beside means of weights; what their names begin with


def split_tensors(checkpoint: dict) -> tuple[dict[str, Tensor], dict]:
    """The tensors of weights and optimizers by name, and the checkpoint with those names in the tensors' places.

    Weights are named as in the state dict (`current.NAME` beside averaged weights), optimizer values
    `optimizer.INDEX.NUMBER.NAME`. A tied weight is one tensor under its first name. Scalars (step counters) stay in
    the second part, as copies.
    """
    names: dict[Tensor, str] = {}  # a tied weight is written once

    def name_of(name: str, value: object) -> object:
        if not isinstance(value, Tensor):
            return value
        return names.setdefault(value, name) if value.ndim else value.detach().clone()

    rest = _replace(checkpoint, name_of)
    tensors = {name: value.detach() for value, name in names.items()}
    return tensors, {**rest, SHAPES: {name: list(value.shape) for name, value in tensors.items()}}


def load_shards(folder: Path, rest: dict, templates: Mapping[str, Tensor]) -> dict:
    """The checkpoint of a folder: `rest` is its contents, whose tensor names are replaced by tensors.

    templates: DTensors by stored name; a tensor whose template has its shape is read as this rank's shard, any other
        in full

    Ranks do not communicate here, so one process may read a folder alone.
    """
    stored = _stored_tensors(folder)
    tensors = {name: _empty_tensor(stored[name], templates.get(name)) for name in rest[SHAPES]}
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # that each process reads for itself
        dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    checkpoint = _replace(rest, lambda _, value: tensors[value] if isinstance(value, str) else value)
    del checkpoint[SHAPES]
    return checkpoint


def check_shards(folder: Path, rest: dict) -> None:
    """CheckpointError unless the files of the folder hold every tensor that `rest` lists, each of its shards included."""
    stored = _stored_tensors(folder)
    if SHAPES not in rest:
        raise CheckpointError(f"{folder}: refused, it does not list its tensors")
    for name, shape in rest[SHAPES].items():
        chunks = stored[name].chunks if name in stored else []
        if sum(prod(chunk.sizes) for chunk in chunks) != prod(shape):
            raise CheckpointError(f"{folder}: refused, a part of {name} is missing")


def _stored_tensors(folder: Path) -> dict[str, TensorStorageMetadata]:
    """Shape, dtype and shards of each stored tensor, from the files' headers; CheckpointError where a header is damaged."""
    try:
        return HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise CheckpointError(f"{folder}: refused, {str(error).splitlines()[0]}") from None


def _empty_tensor(stored: TensorStorageMetadata, template: Tensor | None) -> Tensor:
    """The tensor that DCP reads into: sharded as a template of the stored shape; else full, in RAM."""
    dtype = stored.properties.dtype
    if is_dtensor(template) and template.shape == stored.size:
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
    """DCP's safetensors writer under a temporary folder name, committed when all ranks have written.

    `finish` runs on the first rank, after all have written: it renames the folder and calls `on_commit` with its path.
    """

    def __init__(self, temporary: Path, path: Path, on_commit: Callable[[Path], None]) -> None:
        super().__init__(str(temporary), save_distributed=True)
        self.target, self.on_commit = path, on_commit

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        commit(Path(self.path), self.target)
        self.on_commit(self.target)


class ShardedSaver:
    """Saves one sharded checkpoint at a time; every rank must call its methods, in the same order.

    asynchronous: `save` returns once a copy in RAM exists, and training goes on while a thread writes it; the next
        `save` or `wait` waits for that write first, and raises its error
    """

    def __init__(self, *, asynchronous: bool) -> None:
        self.asynchronous = asynchronous  # go on while a copy in RAM is being written
        self._group = dist.new_group(backend="gloo")  # what a write says must not mix with what the run says
        self._pending: Future | None = None
        self._path = Path()

    def save(self, checkpoint: dict, path: Path, on_commit: Callable[[Path], None]) -> None:
        """Write the checkpoint as a folder `path`, after the previous one is complete.

        on_commit: called with the path, on the first rank, when the folder is complete

        TrainingError if this write failed or, while asynchronous, the previous one.
        """
        self.wait()
        self._path = path
        tensors, rest = split_tensors(checkpoint)
        # the first rank chooses the temporary folder and writes what is no tensor; all learn its name
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
        """Return when no write is pending; TrainingError if the pending one failed."""
        writing, self._pending = self._pending, None
        try:
            if writing is not None:
                writing.result()
        except CheckpointException as error:
            raise self._as_training_error(error) from error

    def _as_training_error(self, error: CheckpointException) -> TrainingError:
        """One line with the cause of the first rank's failure: the operating system's words where the disk refused."""
        causes = [cause for cause, _ in error.failures.values()]
        refused = next(filter(None, map(system_error, causes)), None)
        reason = reason_of(refused) if refused else str(causes[0]).splitlines()[0]
        return TrainingError(f"{self._path}: the checkpoint could not be written, {reason}")
