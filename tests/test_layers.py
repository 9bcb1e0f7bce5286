"""The layers of the package: an import may only point down, and files stay small."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "genai_pl"

# lowest first; what stands in one entry may import what stands before it
LAYERS = [
    {"errors"},
    {"files"},
    {"sealed", "signals"},
    {"folders"},
    {"names", "plugins", "values", "masking"},
    {"bounds"},
    {"specs", "devices", "trust", "run_log", "length"},
    {"kernels"},
    {"objectives", "optim"},
    {"models"},
    {"data", "peft"},
    {"generation"},
    {"modules", "evaluation"},
    {"callbacks", "strategies"},
    {"planning", "references", "option_help"},
    {"compared", "counting", "export", "loading", "summary", "sweeps"},
    {"compare", "fit", "recipes", "resume", "rewards", "terminal"},
    {"serving", "feedback"},
    {"config_errors", "nodes", "unused"},
    {"quoting"},
    {"config", "targets", "run_folder"},
    {"trainer"},
    {"start", "report"},
    {"run", "run_generate", "planned"},
    {"api", "dry_run", "run_evaluate", "run_export", "run_feedback", "run_serve"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
HEAVY = {
    "hydra": {
        "api",
        "config",
        "folders",
        "nodes",
        "config_errors",
        "quoting",
        "trust",
        "targets",
        "run_folder",
        "trainer",
        "run",
        "report",
        "unused",
        "planned",
        "run_generate",
        "run_evaluate",
        "run_export",
        "run_feedback",
        "run_serve",
        "start",
        "dry_run",
    },
    "lightning": {"modules", "callbacks", "strategies", "trainer", "start", "run", "fit", "data", "report"},
}
HEAVY["omegaconf"] = HEAVY["hydra"]


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from ([f"genai_pl.{a.name}" for a in node.names] if node.module == "genai_pl" else [node.module])


def layer(path: Path) -> str:
    part = path.relative_to(PACKAGE).parts[0]
    return part.removesuffix(".py")


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_an_import_points_down(path: Path) -> None:
    own = layer(path)
    if own == "__init__":
        return
    for name in imports(path):
        if name.startswith("genai_pl."):
            target = name.split(".")[1]
            assert target == own or RANK[target] < RANK[own], f"{own} imports {target}"


@pytest.mark.parametrize("library", sorted(HEAVY))
def test_a_framework_stays_in_its_layers(library: str) -> None:
    users = {layer(path) for path in files() if any(name.split(".")[0] == library for name in imports(path))}
    assert users <= HEAVY[library]
    in_data = [p for p in (PACKAGE / "data").glob("*.py") if any(n.split(".")[0] == "lightning" for n in imports(p))]
    assert {p.name for p in in_data} <= {"datamodule.py"}


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_is_read_in_one_sitting(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 250


def test_starting_a_command_imports_nothing_heavy() -> None:
    import subprocess
    import sys

    code = (
        "import sys, genai_pl.cli.command, genai_pl.training.resume;"
        "print([m for m in ('torch', 'lightning', 'transformers', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"
