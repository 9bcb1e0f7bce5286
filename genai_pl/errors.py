"""The errors that a user can cause: each is one line that names the option or file and the fix."""

import errno
import os
import re

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)  # what a write says when no room, or no share of it, is left
OS_ERROR_NUMBER = re.compile(
    r"\(os error (\d+)\)|\[Errno (\d+)\]"
)  # how Rust's libraries, and shutil, tell what the system says


class UserError(Exception):
    """A mistake the user can mend; commands print it as `error: ...` and exit with `status`, without a traceback."""

    status = 1


class ConfigError(UserError):
    """An option, or a pair of options, that cannot work."""

    status = 2


class DataError(UserError):
    """Data that is missing, empty, unreadable or of another shape than the run needs."""


class CheckpointError(UserError):
    """A checkpoint or model folder that is missing, truncated, foreign or unsafe."""


class TrainingError(UserError):
    """A run that cannot go on: a loss that is not a number, a full disk."""


class LossError(TrainingError):
    """A loss or gradient that is not a number: the weights that gave it are of no use."""


def system_error(error: BaseException) -> OSError | None:
    """The error of the operating system that an error is or hides, or None.

    Libraries in Rust say it in words (safetensors, tokenizers), as shutil does of several files; those in C++ leave it
    behind their own (torch).
    """
    if isinstance(error, OSError) and error.errno is not None:
        return error
    if isinstance(error, UserError):
        return None
    if match := OS_ERROR_NUMBER.search(str(error)):
        number = int(match[1] or match[2])
        return OSError(number, os.strerror(number))
    hidden = error.__cause__ or (error.__context__ if isinstance(error, RuntimeError) else None)
    return None if hidden is None else system_error(hidden)


def reason_of(error: OSError) -> str:
    """What an error of the operating system says, without its path."""
    return "the disk is full" if error.errno in DISK_FULL else error.strerror or str(error)


def system_line(error: OSError) -> str:
    """What an error of the operating system says, in one line that names its path, as seen from here."""
    if error.filename is None or isinstance(error.filename, int):
        return reason_of(error)
    path = os.fsdecode(error.filename)
    here = os.path.join(os.getcwd(), "")
    return f"{path.removeprefix(here)}: {reason_of(error)}"
