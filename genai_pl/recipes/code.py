"""Code recipe: functions of the standard library of the running Python; a model completes code and writes bodies.

No download: the library is there. Results are checked by Python's own parser.
"""

import ast
import sysconfig
import textwrap
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from genai_pl.atomic_io import write_atomic
from genai_pl.recipes.fetch import GenerateTexts, Record, read_rows, write_parts

N_HELD = 400
SHORTEST, LONGEST = 80, 1200  # characters of a function
ASIDE = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3", "pydoc_data"}


def find(work: Path) -> list[Path]:
    """The files of the standard library without its tests."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return [p for p in sorted(root.rglob("*.py")) if not ASIDE & set(p.relative_to(root).parts)]


def functions(text: str) -> Iterator[tuple[str, ast.FunctionDef]]:
    """Every function and method of a module, dedented and parsed."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            lines = text.splitlines()[node.lineno - 1 : node.end_lineno]
            yield textwrap.dedent("\n".join(lines)), node


def prepare(files: list[Path], out: Path) -> str:
    """Write each distinct function of moderate length as a text."""
    texts: dict[str, None] = {}
    for path in files:
        try:
            texts |= {text: None for text, _ in functions(path.read_text(encoding="utf-8"))}
        except (SyntaxError, UnicodeDecodeError):  # the library has examples of invalid code
            continue
    chosen_texts = [text for text in texts if SHORTEST < len(text) < LONGEST]
    rows: list[Record] = [
        {"text": chosen_texts[n] + "\n"} for n in np.random.default_rng(0).permutation(len(chosen_texts))
    ]
    return write_parts(out, rows, n_val=min(N_HELD, len(rows) // 10 + 1))


def show(generate: GenerateTexts, data: Path, out: Path) -> list[str]:
    """Write code.py, validation functions with bodies by the model; report how many of them parse."""
    heads = [head for row in read_rows(data / "val.jsonl") if (head := head_of(row["text"]))][:40]
    bodies = [text.split("<|endoftext|>")[0].rstrip() for text in generate(heads, 120)]
    completed = [head + body for head, body in zip(heads, bodies, strict=True)]
    parses = [is_python(text) for text in completed]
    text = "\n\n\n".join(completed) + "\n"
    write_atomic(out / "code.py", lambda part: part.write_text(text, encoding="utf-8"))
    return [
        f"{out / 'code.py'}: {len(heads)} bodies for held docstrings",
        *completed[:6],
        f"{sum(parses)} of {len(heads)} parse",
    ]


def head_of(text: str) -> str | None:
    """The first lines of a function up to the end of its docstring; None if the docstring has no lines of its own or is long."""
    node = ast.parse(text).body[0]
    first = node.body[0]
    if ast.get_docstring(node) is None or first.lineno == node.lineno or first.end_lineno > 12:
        return None
    return "\n".join(text.splitlines()[: first.end_lineno])  # no line break at the end: it is one token with the indent


def is_python(text: str) -> bool:
    """Whether Python can parse the text.

    >>> is_python("x = 1"), is_python("x =")
    (True, False)
    """
    try:
        ast.parse(text)
    except SyntaxError:
        return False
    return True
