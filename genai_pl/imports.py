"""Imports of large libraries, without the collections of cyclic garbage that would run between them.

Torch, Lightning and transformers make half a million objects while they are imported, all of which stay. Python scans
them again and again for garbage, which takes a third of the time of the imports.
"""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collecting_later() -> Iterator[None]:
    """Context for imports: cyclic garbage is collected after it, as the process did before it.

    What was imported counts as old from then on, so the next collections of young objects do not scan it.

    >>> with collecting_later():
    ...     import json
    """
    was_enabled, n_modules = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > n_modules:
            gc.freeze()
            gc.unfreeze()  # into the oldest generation
        if was_enabled:
            gc.enable()
