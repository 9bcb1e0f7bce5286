"""The errors that a user can cause: each is one line that names the option or file and the fix."""

import errno

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)  # what a write says when no room, or no share of it, is left


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
