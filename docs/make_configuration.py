"""Writes docs/configuration.md, every group and option, from the comments in conf/ and genai_pl/config/.

python docs/make_configuration.py [--check]
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from genai_pl.cli.option_help import read_dataclass_fields, read_yaml_fields  # noqa: E402

PAGE = ROOT / "docs" / "configuration.md"
COMMANDS = {
    "config": "train.py", "generate": "generate.py", "evaluate": "evaluate.py", "export": "export.py",
    "inspect": "data.py", "distill": "distill.py", "feedback": "feedback.py", "serve": "serve.py",
}  # fmt: skip
INTRODUCTION = """# Configuration

Every option of every command, written by `python docs/make_configuration.py` from the comments in `conf/`. A group is chosen by
`group=option`, a field is set by `group.field=value`, and `python train.py --cfg job` prints the
composed configuration. The command line overrides `experiment=`, which overrides the files of groups.
"""


def cell(text: str) -> str:
    """Text that may stand in a table."""
    return text.replace("|", "\\|").strip()


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
            lines += [f"### {command}", "", *table(read_yaml_fields(path)[1])]
    for folder in sorted(path for path in (ROOT / "conf").iterdir() if path.is_dir() and path.name != "hydra"):
        lines += [f"## {folder.name}=", ""]
        if folder.name == "model":
            lines += ["Fields of every model, with what they are where an option leaves them out:", ""]
            lines += [
                *table(read_dataclass_fields("ModelConfig")),
                "`rope_scaling.`",
                "",
                *table(read_dataclass_fields("RopeScaling")),
            ]
        if folder.name == "generation":
            lines += ["Fields of every option:", "", *table(read_dataclass_fields("GenerationConfig"))]
        for path in sorted(folder.glob("*.yaml")):
            head, rows = read_yaml_fields(path)
            lines += [f"**`{folder.name}={path.stem}`** {head}", "", *table(rows)]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    if "--check" not in sys.argv:
        PAGE.write_text(page(), encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page():
        sys.exit("error: docs/configuration.md is not what conf/ says: run python docs/make_configuration.py")


if __name__ == "__main__":
    main()
