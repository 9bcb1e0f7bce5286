"""What a reference model says about the rows of a data set, asked once and kept on disk by what it is of."""

import hashlib
import io
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from genai_pl.data import checksummed as sealed
from genai_pl.distributed.dtensor import full_tensor
from genai_pl.peft import base_tensors

log = logging.getLogger(__name__)
ROLES = ("prompt", "chosen", "rejected")

Row = dict[str, object]
CachedLogprobs = dict[bytes, np.ndarray]  # (2,) by the key of a row


def add_reference_logprobs(
    rows: Sequence[Row],
    logprobs: Callable[[list[Row]], Tensor],
    *,
    file: Path,
    batch_size: int,
    rank: int,
    world_size: int,
    over_ranks: Callable[[Tensor], Tensor],
) -> None:
    """Give each pair `reference`, what `logprobs` (rows -> (B, 2)) says of it: from the file, or asked and written there.

    Every rank asks for its share in as many batches as the others, and over_ranks adds up what they found.
    """
    cached = read_logprobs(file)
    keys = [row_key(row) for row in rows]
    first = {key: n for n, key in reversed(list(enumerate(keys)))}  # of equal rows the first is asked for
    uncached = sorted((n for key, n in first.items() if key not in cached), key=lambda n: -_length(rows[n]))
    log.info("reference   %s of %s pairs are in %s", f"{len(rows) - len(uncached):,}", f"{len(rows):,}", file)
    logprob_sums = torch.zeros(len(uncached), 2, dtype=torch.float64)
    batches = [range(i, min(i + batch_size, len(uncached))) for i in range(0, len(uncached), batch_size)]
    for first_batch in range(0, len(batches), world_size):
        own = first_batch + rank
        batch = batches[min(own, len(batches) - 1)]
        values = logprobs([rows[uncached[i]] for i in batch])
        if own < len(batches):
            logprob_sums[batch.start : batch.stop] = values.double().cpu()
    if uncached:
        values = over_ranks(logprob_sums).float().numpy()
        cached |= {keys[n]: value for n, value in zip(uncached, values, strict=True)}
        if rank == 0:
            write_logprobs(file, cached)
    for key, row in zip(keys, rows, strict=True):
        row["reference_logprobs"] = cached[key]


def default_cache() -> Path:
    """The folder of these files, where `datasets` keeps what it has made."""
    from datasets import config

    return Path(config.HF_DATASETS_CACHE) / "reference_logprobs"


@torch.no_grad()
def fingerprint(model: nn.Module, *more: str) -> str:
    """A name for a model without its adapters, by its configuration and weights, and for what else matters."""
    digest = hashlib.sha256("\n".join([repr(sorted(model.config.to_dict().items())), *more]).encode())
    for name, _, _, tensor in base_tensors(model):
        weight = full_tensor(tensor)
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


def row_key(row: Row) -> bytes:
    """A name for a pair by its tokens."""
    digest = hashlib.sha256()
    for role in ROLES:
        tokens = np.asarray(row[role], dtype=np.int64)
        digest.update(len(tokens).to_bytes(8, "little"))
        digest.update(tokens.tobytes())
    return digest.digest()


def read_logprobs(file: Path) -> CachedLogprobs:
    """What the file holds; nothing if it is not there, or damaged."""
    if not file.exists():
        return {}
    if why := sealed.damage(file):
        log.warning("cache       %s was damaged (%s): the reference is asked again", file, why)
        return {}
    with np.load(io.BytesIO(sealed.read_sealed(file))) as arrays:
        return {key.tobytes(): value for key, value in zip(arrays["keys"], arrays["values"], strict=True)}


def write_logprobs(file: Path, cached: CachedLogprobs) -> None:
    """Write the file whole, or not at all, with a seal that `read` checks."""
    keys = np.stack([np.frombuffer(key, dtype=np.uint8) for key in cached])  # (n, 32)
    values = np.stack(list(cached.values()))

    def save(path: Path) -> None:
        with path.open("wb") as stream:
            np.savez(stream, keys=keys, values=values)

    sealed.write_sealed(file, save)


def _length(row: Row) -> int:
    return sum(len(row[role]) for role in ROLES)
