"""Named objects: functions and classes of a user's modules and files, imported by name with errors of one line."""

import importlib
import importlib.util
import os
import sys
from operator import attrgetter
from pathlib import Path
from types import ModuleType

from genai_pl.errors import ConfigError


def named_object(option: str, module: str, attribute: str) -> object:
    """The attribute of a module or a .py file; ConfigError with the import's own error in one line.

    option: the option that names it, with its value.
    """
    make_importable(Path(os.getcwd()))
    try:
        return attrgetter(attribute)(
            _from_file(Path(module)) if module.endswith(".py") else importlib.import_module(module)
        )
    except (Exception, SystemExit) as error:  # importing a user's module can raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        is_import_error = isinstance(error, ImportError | AttributeError | OSError)
        reason = reason if is_import_error else f"{type(error).__name__}: {reason}"
        raise ConfigError(f"{option}: cannot be imported ({reason})") from None


def make_importable(folder: Path) -> None:
    """Put a folder first on sys.path: code beside the data is imported like modules of a project."""
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def _from_file(path: Path) -> ModuleType:
    """The module of a .py file, imported once. Files beside it are importable from it, as for a script."""
    path = path.expanduser().resolve()
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    loaded = sys.modules.get(path.stem)
    if loaded is not None and getattr(loaded, "__file__", None) == str(path):
        return loaded
    # under its own name, unless another module has that name
    make_importable(path.parent)
    spec = importlib.util.spec_from_file_location(path.stem if loaded is None else f"reward_{path.stem}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
