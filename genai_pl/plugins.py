"""Modules of others: found in the working folder, and imported before a command or a worker begins."""

import importlib
import os
import sys

from genai_pl.errors import ConfigError

VARIABLE = "GENAI_PL_IMPORT"  # names of modules, a,b: what models and adapters of one's own need in order to be read


def import_plugins() -> None:
    """Let `_target_` find modules of the working folder, and import those that the environment names."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last: a file there must not stand before a library
    for name in filter(None, os.environ.get(VARIABLE, "").split(",")):
        try:
            importlib.import_module(name.strip())
        except ModuleNotFoundError as error:
            raise ConfigError(f"{VARIABLE}={name}: cannot be imported ({error})") from None
