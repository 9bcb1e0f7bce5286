"""Bounds on the memory that a stored configuration may ask for: the size of the weights stored beside it.

A checkpoint may come from anyone. Without these bounds a file of a kilobyte could state a billion layers, and loading it
would take all memory, or hours.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from genai_pl.errors import CheckpointError, ConfigError
from genai_pl.models.hf.folder import TensorFiles, read_json

CONFIG = "config.json"
MOST_REPEATED = 1000  # layers that few tensors may hold
MOST_EXPERTS = 2**15  # experts that are rows of one tensor: Doge has 16,384
SLACK = 2**28  # bytes for buffers, and for weights that are stored once and used twice
REPEATED = re.compile(r"layer|expert|block|depth|stage")
SIZE = re.compile(r"size|channel|dim|width|length")  # of layers or experts, not their number


def check_counts(values: Mapping[object, object], n_stored: int) -> None:
    """ConfigError for more layers or experts than n_stored tensors: on the meta device too, each costs time."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            check_counts(value, n_stored)
            continue
        is_count = isinstance(value, int) and REPEATED.search(str(name)) and not SIZE.search(str(name))
        if is_count and value > max(n_stored, MOST_EXPERTS if "expert" in str(name) else MOST_REPEATED):
            raise ConfigError(f"its configuration has {name}={value}, and the checkpoint has not their weights")


def check_folder(folder: Path) -> None:
    """ConfigError for a folder whose config.json states more layers or experts than its files have tensors."""
    if not (folder / CONFIG).is_file():  # a hub id
        return
    try:
        n_stored = len(TensorFiles(folder).files)
    except CheckpointError:  # of another format, or damaged: transformers says what is wrong
        return
    check_counts(read_json(folder / CONFIG), n_stored)


def check_sizes(model: nn.Module, stored: Mapping[str, Tensor]) -> None:
    """ConfigError for a model on the meta device that needs more than four times the stored bytes, plus SLACK."""
    needed = sum(x.numel() * x.element_size() for x in (*model.parameters(), *model.buffers()))
    storages = [x.untyped_storage() for x in stored.values() if not x.is_meta]
    stored_bytes = {
        storage.data_ptr(): storage.nbytes() for storage in storages
    }  # not the shapes: a view may exceed its memory
    capacity = sum(size * 4 for size in stored_bytes.values())  # weights stored in a byte each become float32
    if needed > capacity + SLACK:
        raise ConfigError(
            f"its configuration needs {needed:,} bytes, and the checkpoint has {sum(stored_bytes.values()):,}"
        )
