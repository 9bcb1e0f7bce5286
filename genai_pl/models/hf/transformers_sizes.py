"""How much memory the configuration of a model of transformers may ask for: what the weights stored with it bear out."""

import re
from collections.abc import Mapping

from torch import Tensor, nn

from genai_pl.errors import ConfigError

MOST_REPEATED = 1000  # layers or experts that a few tensors may stand for
SLACK = 2**28  # bytes of buffers, and of weights that are stored once and used twice
REPEATED = re.compile(r"layer|expert|block|depth|stage")


def check_counts(values: Mapping[object, object], n_stored: int) -> None:
    """ConfigError for more layers or experts than there are tensors: even without memory, each costs time."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            check_counts(value, n_stored)
        elif REPEATED.search(str(name)) and isinstance(value, int) and value > max(n_stored, MOST_REPEATED):
            raise ConfigError(f"its configuration has {name}={value}, and the checkpoint has not their weights")


def check_sizes(model: nn.Module, stored: Mapping[str, Tensor]) -> None:
    """ConfigError for a model, on the meta device, that needs more memory than the stored weights and some slack."""
    needed = sum(x.numel() * x.element_size() for x in (*model.parameters(), *model.buffers()))
    storages = [x.untyped_storage() for x in stored.values() if not x.is_meta]
    stored_bytes = {storage.data_ptr(): storage.nbytes() for storage in storages}  # which a view may claim more of
    capacity = sum(size * 4 for size in stored_bytes.values())  # of weights in a byte each, or less
    if needed > capacity + SLACK:
        raise ConfigError(
            f"its configuration needs {needed:,} bytes, and the checkpoint has {sum(stored_bytes.values()):,}"
        )
