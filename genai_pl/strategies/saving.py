"""Writing checkpoints in pieces: each process its own, at once or while the run goes on."""

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.storage import WriteResult

from genai_pl.errors import TrainingError, reason_of, system_error
from genai_pl.files import CONTENTS, put_in_place, start_writing
from genai_pl.models.pieces import split


class PieceWriter(HuggingFaceStorageWriter):
    """safetensors files under a temporary name, which the first process renames when all have written theirs."""

    def __init__(self, temporary: Path, path: Path, written: Callable[[Path], None]) -> None:
        super().__init__(str(temporary), save_distributed=True)
        self.target, self.written = path, written

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        put_in_place(Path(self.path), self.target)
        self.written(self.target)


class PieceSaver:
    """Writes one checkpoint at a time; all processes must call its methods."""

    def __init__(self, *, later: bool) -> None:
        self.later = later  # go on while a copy in RAM is being written
        self._group = dist.new_group(backend="gloo")  # what a write says must not mix with what the run says
        self._under_way: Future | None = None
        self._path = Path()

    def save(self, checkpoint: dict, path: Path, written: Callable[[Path], None]) -> None:
        """Write the checkpoint as a folder, after the one before; TrainingError if that, or this one, went wrong."""
        self.wait()
        self._path = path
        tensors, rest = split(checkpoint)
        place: list[Path | None] = [None]
        if dist.get_rank() == 0:
            place = [start_writing(path)]
            place[0].mkdir()
            torch.save(rest, place[0] / CONTENTS)
        dist.broadcast_object_list(place, group=self._group)
        options = {"storage_writer": PieceWriter(place[0], path, written), "process_group": self._group}
        if self.later:
            self._under_way = dcp.async_save(tensors, **options)
            return
        try:
            dcp.save(tensors, **options)
        except CheckpointException as error:
            raise self._explained(error) from error

    def wait(self) -> None:
        """Return when nothing is being written any more; TrainingError if it went wrong."""
        writing, self._under_way = self._under_way, None
        try:
            if writing is not None:
                writing.result()
        except CheckpointException as error:
            raise self._explained(error) from error

    def _explained(self, error: CheckpointException) -> TrainingError:
        causes = [cause for cause, _ in error.failures.values()]
        refused = next(filter(None, map(system_error, causes)), None)
        reason = reason_of(refused) if refused else str(causes[0]).splitlines()[0]
        return TrainingError(f"{self._path}: the checkpoint could not be written, {reason}")
