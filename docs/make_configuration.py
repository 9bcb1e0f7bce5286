"""Writes docs/configuration.md, every group and option, from the comments in conf/ and genai_pl/specs.py.

python docs/make_configuration.py [--check]
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "configuration.md"
COMMANDS = {
    "config": "train.py", "generate": "generate.py", "evaluate": "evaluate.py", "export": "export.py",
    "feedback": "feedback.py", "serve": "serve.py",
}  # fmt: skip
INTRODUCTION = """# Configuration

Every option of every command, written by `python docs/make_configuration.py` from the comments in `conf/`. A group is chosen by
`group=option`, a field is set by `group.field=value`, and `python train.py --cfg job` prints what a command line comes to. The
command line beats `experiment=`, which beats what an option of a group says, which beats the defaults.
"""


def cell(text: str) -> str:
    """Text that may stand in a table."""
    return text.replace("|", "\\|").strip()


def of_yaml(path: Path) -> tuple[str, list[tuple[str, str, str]]]:
    """What the file says of itself, and (field, value, meaning) of its fields."""
    head, rows, parents, base = "", [], [], 0
    for line in path.read_text(encoding="utf-8").splitlines():
        text = line.strip()
        if text.startswith("#"):
            head = head or (text.lstrip("# ") if text != "# @package _global_" else "")
            continue
        depth = (len(line) - len(line.lstrip())) // 2
        if text.startswith("-"):
            parents, base = [], depth + 1  # an entry of a list
        if not text or text.startswith("-") or ":" not in text:
            continue
        base = base if depth >= base else 0
        depth -= base
        name, _, rest = text.partition(":")
        value, _, meaning = rest.partition(" # ")
        parents = [*parents[:depth], name]
        if parents[0] in ("defaults", "hydra") or name.startswith("_"):
            continue
        if value.strip() or meaning:
            rows.append((".".join(parents), value.strip(), meaning))
    return head, rows


def of_dataclass(name: str) -> list[tuple[str, str, str]]:
    """The same of a dataclass in specs.py."""
    source = (ROOT / "genai_pl" / "specs.py").read_text(encoding="utf-8")
    body = source.partition(f"class {name}:")[2].partition("\n    def ")[0].partition("\n\n\n")[0]
    rows = []
    for line in body.splitlines():
        field, colon, rest = line.strip().partition(": ")
        if not colon or not field.isidentifier():
            continue
        given, _, meaning = rest.partition("  # ")
        value = given.partition(" = ")[2].replace("None", "null").replace("True", "true").replace("False", "false")
        value = value.rpartition(".")[2] if value[:1].isupper() else value
        rows.append((field, "" if value.startswith("field(") else value, meaning))
    return rows


def table(rows: list[tuple[str, str, str]]) -> list[str]:
    """Lines of a table."""
    if not rows:
        return []
    body = [f"| `{name}` | {f'`{cell(value)}`' if value else ''} | {cell(meaning)} |" for name, value, meaning in rows]
    return ["| field | value | meaning |", "|---|---|---|", *body, ""]


def page() -> str:
    """The whole page."""
    lines = [INTRODUCTION, "## Commands", ""]
    for stem, command in COMMANDS.items():
        path = ROOT / "conf" / f"{stem}.yaml"
        if path.exists():
            lines += [f"### {command}", "", *table(of_yaml(path)[1])]
    for folder in sorted(path for path in (ROOT / "conf").iterdir() if path.is_dir() and path.name != "hydra"):
        lines += [f"## {folder.name}=", ""]
        if folder.name == "model":
            lines += ["Fields of every model, with what they are where an option leaves them out:", ""]
            lines += [*table(of_dataclass("ModelConfig")), "`rope_scaling.`", "", *table(of_dataclass("RopeScaling"))]
        if folder.name == "generation":
            lines += ["Fields of every option:", "", *table(of_dataclass("GenerationConfig"))]
        for path in sorted(folder.glob("*.yaml")):
            head, rows = of_yaml(path)
            lines += [f"**`{folder.name}={path.stem}`** {head}", "", *table(rows)]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    if "--check" not in sys.argv:
        PAGE.write_text(page(), encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page():
        sys.exit("error: docs/configuration.md is not what conf/ says: run python docs/make_configuration.py")


if __name__ == "__main__":
    main()
