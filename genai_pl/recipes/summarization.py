"""Summarization recipe: docstrings of installed Python packages; a model reads a docstring's body and writes its first line.

By convention the first line of a docstring summarizes the rest, so the packages at hand are a data set of summaries.
"""

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
LONGEST = 400  # characters of a body
PACKAGES = ("datasets", "lightning", "networkx", "numpy", "pandas", "sympy", "torch")  # installed with this project


def find(work: Path) -> list[Path]:
    """The files of the standard library and of packages that are installed anyway; nothing is downloaded."""
    library = Path(sysconfig.get_paths()["purelib"])
    package_files = [
        p for name in PACKAGES for p in sorted((library / name).rglob("*.py")) if not ASIDE & set(p.parts[-4:-1])
    ]
    return [*code.find(work), *package_files]


def pairs(text: str) -> Iterator[tuple[str, str]]:
    """(body with the name of its function or class, first line) of each docstring of a module."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            summary, _, rest = (ast.get_docstring(node) or "").partition("\n\n")
            summary, rest = " ".join(summary.split()), " ".join(rest.split())[:LONGEST]
            if len(rest) >= 40 and 20 <= len(summary) <= 90 and re.match(r"[A-Z].*\.$", summary):
                yield f"{node.name}: {rest}", summary


def prepare(files: list[Path], out: Path) -> str:
    """Write pairs of source and target; each summary occurs once, so no validation target was seen."""
    bodies: dict[str, str] = {}
    for path in files:
        try:
            bodies |= {summary: rest for rest, summary in pairs(path.read_text(encoding="utf-8"))}
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue
    items = list(bodies.items())
    order = np.random.default_rng(0).permutation(len(items))
    rows: list[Record] = [{"source": items[n][1], "target": items[n][0]} for n in order]
    return write_parts(out, rows, n_val=min(N_HELD, len(rows) // 10 + 1))


def show(generate: GenerateTexts, data: Path, out: Path) -> list[str]:
    """Write pairs.md and report scores."""
    return shown.show(generate, data, out)
