"""User errors: mistakes a user can correct, each one line that names the option or file and the fix.

Commands print `error: ...` and exit with the class's status, without a traceback. Anything else that is raised is a bug.
"""

import errno
import os
import re

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)  # no space left, or the quota is used up
OS_ERROR_NUMBER = re.compile(
    r"\(os error (\d+)\)|\[Errno (\d+)\]"
)  # how Rust's libraries, and shutil, tell what the system says


class UserError(Exception):
    """Base class of the errors that a user can correct. status: exit status of the command."""

    status = 1


class ConfigError(UserError):
    """An option, or a pair of options, that cannot work; exit status 2, as for a usage error."""

    status = 2


class DataError(UserError):
    """Data that is missing, empty, unreadable, or of other columns than the run needs."""


class CheckpointError(UserError):
    """A checkpoint or model folder that is missing, truncated, of another program, or unsafe."""


class TrainingError(UserError):
    """A run that cannot continue: a stop by a signal, a full disk."""


class LossError(TrainingError):
    """A loss or gradient that is NaN or infinite; the weights that gave it are not worth saving."""


def system_error(error: BaseException) -> OSError | None:
    """The OSError behind an error, or None.

    Libraries in Rust (safetensors, tokenizers) and shutil give its number in the message only; torch's C++ code raises a
    RuntimeError while the OSError is its context.
    """
    if isinstance(error, OSError) and error.errno is not None:
        return error
    if isinstance(error, UserError):
        return None
    # the number is in the text
    if match := OS_ERROR_NUMBER.search(str(error)):
        number = int(match[1] or match[2])
        return OSError(number, os.strerror(number))
    # or the OSError is the cause, or the context of a RuntimeError
    hidden = error.__cause__ or (error.__context__ if isinstance(error, RuntimeError) else None)
    return None if hidden is None else system_error(hidden)


def reason_of(error: OSError) -> str:
    """The message of an OSError, without its path."""
    return "the disk is full" if error.errno in DISK_FULL else error.strerror or str(error)


def system_line(error: OSError) -> str:
    """The message of an OSError in one line with its path, relative to the working folder where it is below."""
    if error.filename is None or isinstance(error.filename, int):
        return reason_of(error)
    path = os.fsdecode(error.filename)
    here = os.path.join(os.getcwd(), "")
    return f"{path.removeprefix(here)}: {reason_of(error)}"
