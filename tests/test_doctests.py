"""The examples in docstrings hold."""

import ast
import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def docstrings() -> list[tuple[str, str, str]]:
    """Module, name and docstring of everything in the package whose docstring has an example."""
    examples = []
    for path in sorted((ROOT / "genai_pl").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)) if ">>>" in text else ():
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and ">>>" in (doc := ast.get_docstring(node) or ""):
                examples.append((".".join(path.relative_to(ROOT).with_suffix("").parts), node.name, doc))
    return examples


@pytest.mark.parametrize(("module", "name", "doc"), docstrings(), ids=lambda value: value.rpartition(".")[2][:40])
def test_an_example_gives_what_it_says(module: str, name: str, doc: str) -> None:
    if module.startswith("genai_pl.serving"):
        pytest.importorskip("fastapi", reason="needs pip install -e '.[serve]'")
    # from the source: what a decorator has wrapped is not found by doctest itself
    test = doctest.DocTestParser().get_doctest(doc, vars(importlib.import_module(module)), name, module, 0)
    output: list[str] = []
    assert doctest.DocTestRunner(verbose=False).run(test, out=output.append).failed == 0, "".join(output)
