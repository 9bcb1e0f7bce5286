"""Plugins: modules of a user's own, imported before a command or a worker process begins.

They register models, adapters and data sources, without which a checkpoint that needs them cannot be read.
"""

import importlib
import os
import sys

from genai_pl.errors import ConfigError

VARIABLE = "GENAI_PL_IMPORT"  # module names, separated by commas

# appended to the error for a name that no module of ours defines
ADVICE = f"; if a module of your own brings it, name that: {VARIABLE}=MODULE"


def import_plugins(*, named: bool = False) -> None:
    """Import the modules that GENAI_PL_IMPORT names; ConfigError for a missing one.

    named: True if the command line names modules too. Then, or if the variable is set, the working folder joins sys.path;
    otherwise not, since it may be a run folder that somebody else made.
    """
    named = named or bool(os.environ.get(VARIABLE))
    if named and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last: a file there must not stand before a library
    for name in filter(None, os.environ.get(VARIABLE, "").split(",")):
        try:
            importlib.import_module(name.strip())
        except ModuleNotFoundError as error:
            raise ConfigError(f"{VARIABLE}={name}: cannot be imported ({error})") from None
