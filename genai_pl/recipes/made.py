"""Recipe data: the check that it was made before a run trains on it."""

from pathlib import Path

from genai_pl.errors import DataError
from genai_pl.recipes import RECIPES


def check_prepared(path: str) -> None:
    """DataError that names the command to make a recipe's data, where data.path is one and does not exist."""
    name = Path(path).parent.name
    if name in RECIPES and not Path(path).exists():
        raise DataError(f"data.path={path}: not made yet; make it with: python recipes.py {name}")
