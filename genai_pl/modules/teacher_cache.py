"""Teacher cache: a teacher's likeliest tokens at every position of the training rows, written once and read by later runs.

A position takes 4 bytes for each of the k tokens (6 with more than 65,536 words): its id and its log-probability in float16,
and 2 bytes for the log of the probability of all others. On reading, the k + 1 are normalized, so that float16 loses digits
of each but no mass. Files of the cache are named after the teacher, the rows and k: they fit, or are not found;
one that is named in `objective.teacher` is checked.
A row is marked after it has been written, so a writer that was killed goes on where it was.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from genai_pl.atomic_io import naming, write_atomic
from genai_pl.errors import CheckpointError, ConfigError
from genai_pl.kernels.distillation import top_logprobs
from genai_pl.modules.base import Batch
from genai_pl.objectives import IGNORED

if TYPE_CHECKING:
    from genai_pl.modules.teachers import RowTeacher

log = logging.getLogger(__name__)
CONTENTS = "teacher.json"


class Contents(NamedTuple):
    """What a file holds: rows of seq_len positions with top_k tokens each, and the dtype of ids.

    digest: of the rows (`digest_rows`). teacher: its fingerprint. name: what it was called. temperature: of its predictions.
    """

    rows: int
    seq_len: int
    top_k: int
    digest: str
    teacher: str
    name: str
    temperature: float
    ids: str = "int32"


class TeacherCache:
    """The arrays of a folder: ids (R, T, K), logprobs (R, T, K + 1) in float16, and done (R,), 1 for finished rows."""

    def __init__(self, folder: Path, *, writable: bool = False) -> None:
        self.folder, mode = folder, "r+" if writable else "r"
        try:
            values = json.loads((folder / CONTENTS).read_text())
            self.contents = Contents(**values)
            R, T, K = self.contents[:3]
            self.ids = np.memmap(folder / "ids", dtype=self.contents.ids, mode=mode, shape=(R, T, K))
            self.logprobs = np.memmap(folder / "logprobs", dtype=np.float16, mode=mode, shape=(R, T, K + 1))
            self.done = np.memmap(folder / "done", dtype=np.uint8, mode=mode, shape=(R,))
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"{folder}: not a teacher's file of this version, or damaged ({error})") from None

    @property
    def bytes_per_token(self) -> int:
        """Bytes of a position: k ids, and k + 1 log-probabilities in float16."""
        K = self.contents.top_k
        return K * self.ids.itemsize + 2 * (K + 1)

    @staticmethod
    def is_at(folder: Path) -> bool:
        """True if a folder looks like one of these. Nothing is read."""
        return (folder / CONTENTS).is_file()

    @staticmethod
    def create(folder: Path, contents: Contents, *, vocab_size: int) -> None:
        """Files of zeros for so many rows, unless the folder exists or another process makes it meanwhile; they take space as
        they are written.
        """
        if folder.exists():
            return
        contents = contents._replace(ids="uint16" if vocab_size <= 2**16 else "int32")
        R, T, K = contents[:3]

        def write(path: Path) -> None:
            path.mkdir()
            for name, dtype, shape in (
                ("ids", contents.ids, (R, T, K)),
                ("logprobs", np.float16, (R, T, K + 1)),
                ("done", np.uint8, (R,)),
            ):
                np.memmap(path / name, dtype=dtype, mode="w+", shape=shape).flush()
            (path / CONTENTS).write_text(json.dumps(contents._asdict()))

        folder.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(folder, write, keep=True)

    def write(self, rows: Sequence[int], logprobs: Tensor, ids: Tensor) -> None:
        """Store logprobs (B, T, K + 1) and ids (B, T, K) of some rows, then mark them as done."""
        lowest = float(np.finfo(np.float16).min)  # of a remainder that is no probability at all
        values = logprobs.clamp(min=lowest).cpu().numpy().astype(np.float16)
        with naming(self.folder):
            self._store("ids", self.ids, rows, ids.cpu().numpy().astype(self.ids.dtype))
            self._store("logprobs", self.logprobs, rows, values)
            self._store("done", self.done, rows, np.ones(len(rows), np.uint8))

    def _store(self, name: str, array: np.memmap, rows: Sequence[int], values: np.ndarray) -> None:
        """Write the beginnings of some rows of a file, and wait until they are on disk.

        They do not go through the mapping: a full disk would end the process there (SIGBUS), and here it is an OSError.
        """
        n_row = array.nbytes // len(array)
        with (self.folder / name).open("r+b", buffering=0) as file:
            for row, value in zip(rows, values, strict=True):
                file.seek(int(row) * n_row)
                rest = memoryview(value.tobytes())
                while rest:
                    rest = rest[file.write(rest) :]
            os.fsync(file.fileno())

    def read(self, rows: Tensor, length: int, *, device: torch.device) -> tuple[Tensor, Tensor]:
        """Log-probabilities (B, length, K + 1), whose exponentials add up to 1, and ids (B, length, K) of some rows."""
        numbers = rows.cpu().numpy()
        logprobs = torch.from_numpy(self.logprobs[numbers, :length].astype(np.float32)).to(device)
        ids = torch.from_numpy(self.ids[numbers, :length].astype(np.int64)).to(device)
        return logprobs.log_softmax(-1), ids


def fill_cache(
    cache: TeacherCache,
    rows: Sequence[dict],
    collate: Callable[[list[dict]], Batch],
    teacher: "RowTeacher",
    *,
    device: torch.device,
    batch_size: int,
    rank: int = 0,
    n_ranks: int = 1,
    barrier: Callable[[], object] = lambda: None,
    context: Callable[[], AbstractContextManager] = nullcontext,
    advance: Callable[[int], object] = lambda n: None,
) -> None:
    """Have the teacher write what a file lacks of the training rows.

    collate: makes batches of rows that have a `key`. context: of its forward passes, for their precision. advance: is called
    with the number of rows of each batch that is written. Each of n_ranks replicas computes a part of the rows, on a file
    system that all of them see; barrier: waits for all.
    """
    is_done = np.asarray(cache.done == 1)
    barrier()  # all have seen what is missing before anyone writes
    log.info("teacher     %s of %s rows are in %s", f"{int(is_done.sum()):,}", f"{len(rows):,}", cache.folder)
    # the batches of an undisturbed writer: a row's last bits depend on the rows beside it
    batches = [np.arange(i, min(i + batch_size, len(rows))) for i in range(0, len(rows), batch_size)]
    batches = [numbers for numbers in batches if not is_done[numbers].all()]
    for numbers in batches[rank::n_ranks]:
        batch = collate([{**rows[int(n)], "key": (0, int(n))} for n in numbers])
        batch = {name: x.to(device) for name, x in batch.items()}
        with context():
            cache.write(numbers, *_teach(teacher, batch, cache.contents.top_k))
        advance(int((~is_done[numbers]).sum()))
    barrier()


@torch.no_grad()
def _teach(teacher: "RowTeacher", batch: Batch, k: int) -> tuple[Tensor, Tensor]:
    """The teacher's logprobs (B, T, K + 1) and ids (B, T, K) of a batch, zeros where nothing is learned."""
    labels = batch["labels"]
    predict = teacher(batch, labels).predict
    places = (labels.flatten() != IGNORED).nonzero()[:, 0]
    logprobs, ids = labels.new_zeros(labels.numel(), k + 1, dtype=torch.float32), labels.new_zeros(labels.numel(), k)
    for part in places.split(256):
        taught = predict(part)
        taught = top_logprobs(taught.logprobs, k) if taught.ids is None else taught
        logprobs[part], ids[part] = taught.logprobs, taught.ids
    return logprobs.view(*labels.shape, -1), ids.view(*labels.shape, -1)


def digest_rows(rows: Sequence[dict], seq_len: int) -> str:
    """A name of the tokens of all rows and of what is learned of them, in hex."""
    digest = hashlib.sha256(f"{len(rows)} {seq_len}".encode())
    for n in range(len(rows)):
        row = rows[n]
        for name in ("input_ids", "segment_ids", "loss_mask"):
            if name in row:
                values = np.asarray(row[name], dtype=np.int64)
                digest.update(f"{name} {len(values)}".encode())
                digest.update(values.tobytes())
    return digest.hexdigest()


def check_file(cache: TeacherCache, rows: Sequence[dict], *, seq_len: int, temperature: float) -> None:
    """ConfigError where a file that `objective.teacher` names is not of these rows and this temperature, or not complete."""
    contents, option = cache.contents, f"objective.teacher={cache.folder}"
    if (contents.rows, contents.seq_len) != (len(rows), seq_len):
        raise ConfigError(
            f"{option}: holds {contents.rows:,} rows of {contents.seq_len} tokens, the data give {len(rows):,} of {seq_len}; "
            "give the data options that it was written with (data.seq_len, data.val_fraction, seed)"
        )
    if contents.digest != digest_rows(rows, seq_len):
        raise ConfigError(f"{option}: holds other rows than the data give: other texts, tokenizer or chat template")
    if contents.temperature != temperature:
        raise ConfigError(
            f"{option}: was written at temperature {contents.temperature}; set objective.temperature to it"
        )
    if missing := int((cache.done == 0).sum()):
        raise ConfigError(f"{option}: {missing:,} rows are missing; the command that wrote it goes on where it was")


def default_cache() -> Path:
    """The default folder of these files, in the cache folder of `datasets`."""
    from datasets import config

    return Path(config.HF_DATASETS_CACHE) / "teachers"
