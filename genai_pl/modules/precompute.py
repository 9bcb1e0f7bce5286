"""Precomputed reference log-probabilities: computed once per pair, and kept on disk by reference model and pair.

DPO needs the log-probabilities of both completions under the frozen reference in every epoch. They never change, so
this module computes them before training and frees the reference. The file is named after a fingerprint of the
reference (configuration, weights, precision), and a pair after its tokens: another run with the same reference and
overlapping data reuses them, and a changed chat template or tokenizer cannot match by accident.
"""

import hashlib
import io
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from genai_pl.data import checksummed
from genai_pl.distributed.dtensor import full_tensor
from genai_pl.peft import base_tensors

log = logging.getLogger(__name__)
ROLES = ("prompt", "chosen", "rejected")

Row = dict[str, object]
CachedLogprobs = dict[bytes, np.ndarray]  # chosen, rejected (2,) by `row_key`


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
    """Add `reference_logprobs` (2,), chosen and rejected, to each pair: from the file, or computed and written there.

    rows: pairs of token ids, extended in place
    logprobs: rows -> (B, 2), a forward pass of the reference, in which all ranks take part where it is sharded
    file: cache, read and extended
    rank, world_size: this replica and their number; each computes every world_size-th batch
    over_ranks: sum of a tensor over replicas, by which each gets the others' values
    """
    # pairs that are not in the file, equal ones once, the longest first: an out-of-memory error comes at once
    cached = read_logprobs(file)
    keys = [row_key(row) for row in rows]
    first = {key: n for n, key in reversed(list(enumerate(keys)))}  # of equal rows the first is asked for
    uncached = sorted((n for key, n in first.items() if key not in cached), key=lambda n: -_length(rows[n]))
    log.info("reference   %s of %s pairs are in %s", f"{len(rows) - len(uncached):,}", f"{len(rows):,}", file)
    # each replica fills its batches of a zero tensor; those without one repeat the last, so that all make equally many calls
    logprob_sums = torch.zeros(len(uncached), 2, dtype=torch.float64)
    batches = [range(i, min(i + batch_size, len(uncached))) for i in range(0, len(uncached), batch_size)]
    for first_batch in range(0, len(batches), world_size):
        own = first_batch + rank
        batch = batches[min(own, len(batches) - 1)]
        values = logprobs([rows[uncached[i]] for i in batch])
        if own < len(batches):
            logprob_sums[batch.start : batch.stop] = values.double().cpu()
    # share, and extend the file
    if uncached:
        values = over_ranks(logprob_sums).float().numpy()
        cached |= {keys[n]: value for n, value in zip(uncached, values, strict=True)}
        if rank == 0:
            write_logprobs(file, cached)
    for key, row in zip(keys, rows, strict=True):
        row["reference_logprobs"] = cached[key]


def default_cache() -> Path:
    """The default folder of these files, in the cache folder of `datasets`."""
    from datasets import config

    return Path(config.HF_DATASETS_CACHE) / "reference_logprobs"


@torch.no_grad()
def fingerprint(model: nn.Module, *more: str) -> str:
    """A name of 32 hex digits for a model without its adapters, by configuration, weights and further strings.

    Of a sharded model the weights are gathered one by one, so every rank must call it.
    """
    digest = hashlib.sha256("\n".join([repr(sorted(model.config.to_dict().items())), *more]).encode())
    for name, _, _, tensor in base_tensors(model):
        weight = full_tensor(tensor)
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


def row_key(row: Row) -> bytes:
    """A name, 32 bytes, for a pair: a hash of its tokens, each list with its length before it."""
    digest = hashlib.sha256()
    for role in ROLES:
        tokens = np.asarray(row[role], dtype=np.int64)
        digest.update(len(tokens).to_bytes(8, "little"))
        digest.update(tokens.tobytes())
    return digest.digest()


def read_logprobs(file: Path) -> CachedLogprobs:
    """The cached values of a file; none where it does not exist, or is damaged, which is logged."""
    if not file.exists():
        return {}
    if why := checksummed.find_damage(file):
        log.warning("cache       %s was damaged (%s): the reference is asked again", file, why)
        return {}
    with np.load(io.BytesIO(checksummed.read_checksummed(file))) as arrays:
        return {key.tobytes(): value for key, value in zip(arrays["keys"], arrays["values"], strict=True)}


def write_logprobs(file: Path, cached: CachedLogprobs) -> None:
    """Write the file atomically, with the checksum that `read_logprobs` checks."""
    keys = np.stack([np.frombuffer(key, dtype=np.uint8) for key in cached])  # (n, 32)
    values = np.stack(list(cached.values()))

    def save(path: Path) -> None:
        with path.open("wb") as stream:
            np.savez(stream, keys=keys, values=values)

    checksummed.write_checksummed(file, save)


def _length(row: Row) -> int:
    return sum(len(row[role]) for role in ROLES)
