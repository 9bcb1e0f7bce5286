"""The layers of the package: an import may only point down, and files stay small."""

import ast
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "genai_pl"
STATED = runpy.run_path(str(ROOT / "docs" / "make_layers.py"))
RANK = {name: rank for rank, (names, _) in enumerate(STATED["LAYERS"]) for name in names.split()}


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from ([f"genai_pl.{a.name}" for a in node.names] if node.module == "genai_pl" else [node.module])


def layer(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_an_import_points_down(path: Path) -> None:
    own = layer(path)
    if own == "__init__":
        return
    for name in imports(path):
        if name.startswith("genai_pl."):
            target = name.split(".")[1]
            assert target == own or RANK[target] < RANK[own], f"{own} imports {target}"


@pytest.mark.parametrize("library", sorted(STATED["FRAMEWORKS"]))
def test_a_framework_stays_in_its_layers(library: str) -> None:
    users = {layer(path) for path in files() if any(name.split(".")[0] == library for name in imports(path))}
    assert users <= STATED["FRAMEWORKS"][library]
    in_data = [p for p in (PACKAGE / "data").glob("*.py") if any(n.split(".")[0] == "lightning" for n in imports(p))]
    assert {p.name for p in in_data} <= {"datamodule.py"}


@pytest.mark.parametrize("page", STATED["PAGES"])
def test_a_page_shows_the_layers_as_they_are_stated(page: str) -> None:
    text = (ROOT / page).read_text()
    assert STATED["table"]() in text
    assert STATED["with_table"](text) == text


def explanation(text: str) -> set[int]:
    """The lines that a docstring or a comment of its own takes."""
    lines = {n for n, line in enumerate(text.splitlines(), 1) if line.lstrip().startswith("#")}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(
            node
        ):
            lines |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return lines


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_is_read_in_one_sitting(path: Path) -> None:
    text = path.read_text()
    code = {n for n, line in enumerate(text.splitlines(), 1) if line.strip()} - explanation(text)
    assert len(code) <= 250
    assert len(text.splitlines()) <= 350
