"""Modules of others: found in the working folder, and imported before a command or a worker begins."""

import importlib
import os
import sys

from genai_pl.errors import ConfigError

VARIABLE = "GENAI_PL_IMPORT"  # names of modules, a,b: what models and adapters of one's own need in order to be read

# to be added where something is asked for that no module of ours has
ADVICE = f"; if a module of your own brings it, name that: {VARIABLE}=MODULE"


def import_plugins(*, named: bool = False) -> None:
    """Import the modules that the environment names; those of the working folder too, if it or `named` says that some count.

    Otherwise the folder is no place for modules: it may be a run that somebody else made.
    """
    named = named or bool(os.environ.get(VARIABLE))
    if named and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last: a file there must not stand before a library
    for name in filter(None, os.environ.get(VARIABLE, "").split(",")):
        try:
            importlib.import_module(name.strip())
        except ModuleNotFoundError as error:
            raise ConfigError(f"{VARIABLE}={name}: cannot be imported ({error})") from None
