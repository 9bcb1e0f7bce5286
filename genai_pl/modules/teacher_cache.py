"""Teacher cache: a teacher's likeliest tokens at every position of the training rows, written once and read by later runs.

A position takes 4 bytes for each of the k tokens (6 with more than 65,536 words): its id and its log-probability in float16,
and 2 bytes for the log of the probability of all others. On reading, the k + 1 are normalized, so that float16 loses digits
of each but no mass. Files are named after the teacher, the rows, k and the temperature: they fit, or are not found.
A row is marked after it has been written, so a writer that was killed goes on where it was.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from genai_pl.atomic_io import naming, write_atomic
from genai_pl.kernels.distillation import top_logprobs
from genai_pl.modules.base import n_replicas
from genai_pl.modules.precompute import fingerprint
from genai_pl.objectives import IGNORED

if TYPE_CHECKING:
    from genai_pl.modules.distillation import DistillModule

log = logging.getLogger(__name__)
SHAPES = "shapes.json"


class TeacherCache:
    """The arrays of a folder: ids (R, T, K), logprobs (R, T, K + 1) in float16, and done (R,), 1 for finished rows."""

    def __init__(self, folder: Path) -> None:
        shapes = json.loads((folder / SHAPES).read_text())
        R, T, K = shapes["rows"], shapes["seq_len"], shapes["top_k"]
        self.folder = folder
        self.ids = np.memmap(folder / "ids", dtype=shapes["ids"], mode="r+", shape=(R, T, K))
        self.logprobs = np.memmap(folder / "logprobs", dtype=np.float16, mode="r+", shape=(R, T, K + 1))
        self.done = np.memmap(folder / "done", dtype=np.uint8, mode="r+", shape=(R,))

    @staticmethod
    def create(folder: Path, *, rows: int, seq_len: int, top_k: int, vocab_size: int) -> None:
        """Files of zeros for so many rows, unless the folder exists; they take space as they are written."""
        if folder.exists():
            return
        ids = "uint16" if vocab_size <= 2**16 else "int32"

        def write(path: Path) -> None:
            path.mkdir()
            for name, dtype, shape in (
                ("ids", ids, (rows, seq_len, top_k)),
                ("logprobs", np.float16, (rows, seq_len, top_k + 1)),
                ("done", np.uint8, (rows,)),
            ):
                np.memmap(path / name, dtype=dtype, mode="w+", shape=shape).flush()
            shapes = {"rows": rows, "seq_len": seq_len, "top_k": top_k, "ids": ids}
            (path / SHAPES).write_text(json.dumps(shapes))

        folder.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(folder, write)

    def write(self, rows: Sequence[int], logprobs: Tensor, ids: Tensor) -> None:
        """Store logprobs (B, T, K + 1) and ids (B, T, K) of some rows, then mark them as done."""
        with naming(self.folder):
            T = ids.shape[1]
            self.ids[rows, :T] = ids.cpu().numpy().astype(self.ids.dtype)
            lowest = float(np.finfo(np.float16).min)  # of a remainder that is no probability at all
            self.logprobs[rows, :T] = logprobs.clamp(min=lowest).cpu().numpy().astype(np.float16)
            self.ids.flush(), self.logprobs.flush()
            self.done[rows] = 1

    def read(self, rows: Tensor, length: int, *, device: torch.device) -> tuple[Tensor, Tensor]:
        """Log-probabilities (B, length, K + 1), whose exponentials add up to 1, and ids (B, length, K) of some rows."""
        numbers = rows.cpu().numpy()
        logprobs = torch.from_numpy(self.logprobs[numbers, :length].astype(np.float32)).to(device)
        ids = torch.from_numpy(self.ids[numbers, :length].astype(np.int64)).to(device)
        return logprobs.log_softmax(-1), ids


def fill_cache(module: "DistillModule", rows: Sequence[dict], *, seq_len: int, batch_size: int) -> TeacherCache:
    """The complete cache of a module's teacher for the training rows; what its folder lacks is computed and written there.

    Each replica computes a part of the rows, on a file system that all of them see.
    """
    trainer, teacher, k = module.trainer, module.teacher, module.top_k
    names = (
        fingerprint(teacher, str(trainer.precision), f"{module.temperature}"),
        digest_rows(rows, seq_len)[:16],
        f"k{k}",
    )
    root = Path(module.teacher_cache) if module.teacher_cache else default_cache()
    folder = root / "-".join(names)
    ranks = trainer.strategy.distributed_sampler_kwargs if n_replicas(trainer) > 1 else {}
    if ranks.get("rank", 0) == 0:
        sizes = {"rows": len(rows), "seq_len": seq_len, "top_k": k, "vocab_size": teacher.config.vocab_size}
        TeacherCache.create(folder, **sizes)
    trainer.strategy.barrier()
    cache = TeacherCache(folder)
    missing = np.flatnonzero(cache.done == 0)
    trainer.strategy.barrier()  # all have seen what is missing before anyone writes
    log.info("teacher     %s of %s rows are in %s", f"{len(rows) - len(missing):,}", f"{len(rows):,}", folder)
    batches = [missing[i : i + batch_size] for i in range(0, len(missing), batch_size)]
    for numbers in batches[ranks.get("rank", 0) :: n_replicas(trainer)]:
        batch = module.collator([{**rows[int(n)], "key": (0, int(n))} for n in numbers])
        batch = {name: x.to(module.device) for name, x in batch.items()}
        with trainer.precision_plugin.forward_context():
            cache.write(numbers, *_teach(module, batch))
    trainer.strategy.barrier()
    return cache


@torch.no_grad()
def _teach(module: "DistillModule", batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The teacher's logprobs (B, T, K + 1) and ids (B, T, K) of a batch, zeros where nothing is learned."""
    labels, k = batch["labels"], module.top_k
    predict = module.teach(batch, labels)
    places = (labels.flatten() != IGNORED).nonzero()[:, 0]
    logprobs, ids = labels.new_zeros(labels.numel(), k + 1, dtype=torch.float32), labels.new_zeros(labels.numel(), k)
    for part in places.split(256):
        taught = top_logprobs(predict(part).logprobs, k)
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


def default_cache() -> Path:
    """The default folder of these files, in the cache folder of `datasets`."""
    from datasets import config

    return Path(config.HF_DATASETS_CACHE) / "teachers"
