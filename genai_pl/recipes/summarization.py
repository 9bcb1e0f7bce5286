"""Docstrings of the Python packages at hand: a model reads what follows the first line, and writes that line."""

import ast
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from genai_pl.recipes import code
from genai_pl.recipes import pairs as shown
from genai_pl.recipes.code import ASIDE
from genai_pl.recipes.fetch import GenerateTexts, Record, write_parts

N_HELD = 500
LONGEST = 400  # characters that are read
PACKAGES = ("datasets", "lightning", "networkx", "numpy", "pandas", "sympy", "torch")  # which this project brings along


def find(work: Path) -> list[Path]:
    """The files of the standard library and of packages that are installed anyway; nothing is downloaded."""
    library = Path(sysconfig.get_paths()["purelib"])
    found = [p for name in PACKAGES for p in sorted((library / name).rglob("*.py")) if not ASIDE & set(p.parts[-4:-1])]
    return [*code.find(work), *found]


def pairs(text: str) -> Iterator[tuple[str, str]]:
    """What a docstring says after its first line, and that line, for each function and class of a module."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            summary, _, rest = (ast.get_docstring(node) or "").partition("\n\n")
            summary, rest = " ".join(summary.split()), " ".join(rest.split())[:LONGEST]
            if len(rest) >= 40 and 20 <= len(summary) <= 90 and re.match(r"[A-Z].*\.$", summary):
                yield f"{node.name}: {rest}", summary


def prepare(files: list[Path], out: Path) -> str:
    """Write pairs of source and target; no summary stands twice, so that none of the held ones was seen."""
    found: dict[str, str] = {}
    for path in files:
        try:
            found |= {summary: rest for rest, summary in pairs(path.read_text(encoding="utf-8"))}
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue
    kept = list(found.items())
    order = np.random.default_rng(0).permutation(len(kept))
    rows: list[Record] = [{"source": kept[n][1], "target": kept[n][0]} for n in order]
    return write_parts(out, rows, held=min(N_HELD, len(rows) // 10 + 1))


def show(generate: GenerateTexts, data: Path, out: Path) -> list[str]:
    """Held pairs with what the model writes, as pairs.md."""
    return shown.show(generate, data, out)
