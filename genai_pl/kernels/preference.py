"""Preference: the order in which `attention` takes its backends on a GPU where none is named.

One for the process, as it is a fact about the GPU and its software, not about a model. A probe sets it at the start of a run
or command (`attention_probe.py`); a backend that is not in it is never taken by auto.
"""

from typing import NamedTuple


class Preference(NamedTuple):
    """backends: names, the first one to take where it can compute a call. reason: why that one, for the log."""

    backends: tuple[str, ...]
    reason: str


UNPROBED = Preference(("triton", "sdpa", "reference"), "its kernels run every mask and option on a GPU")
_current = UNPROBED


def preferred() -> Preference:
    """The preference of this process."""
    return _current


def prefer(preference: Preference) -> None:
    """Set the preference of this process."""
    global _current
    _current = preference
