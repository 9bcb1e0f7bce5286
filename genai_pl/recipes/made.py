"""Data of recipes, which a command makes first."""

from pathlib import Path

from genai_pl.errors import DataError
from genai_pl.recipes import RECIPES


def check_prepared(path: str) -> None:
    """DataError that names the command which makes a recipe's data, where they have not been made."""
    name = Path(path).parent.name
    if name in RECIPES and not Path(path).exists():
        raise DataError(f"data.path={path}: not made yet; make it with: python recipes.py {name}")
