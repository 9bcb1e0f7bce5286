"""The documentation: every command in README and docs composes, links resolve, and the option tables are current."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from genai_pl.cli.command import CONF, register
from genai_pl.cli.quoting import quote_argument
from tests.conftest import some

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = {name: name for name in ("generate", "evaluate", "export", "feedback", "serve", "distill")} | {
    "train": "config"
}
COMMAND = re.compile(
    r"(?<!\$ )(?:torchrun [^\n`]*? |python )(train|generate|evaluate|export|feedback|serve|distill)\.py([^`\n]*)"
)


def commands() -> list[tuple[str, str, str]]:
    """Page, command and arguments of every command on the pages."""
    matches = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ").replace("\\|", "|")
        for name, rest in COMMAND.findall(text):
            matches.append((page.name, name, re.split(r"\s[#|]|\s{3,}| *&", rest)[0].strip()))
    first = {(name, rest): page for page, name, rest in reversed(matches)}  # a command of several pages is tried once
    return [(page, name, rest) for (name, rest), page in first.items()]


def overrides(arguments: str) -> list[str]:
    """The words of a command line, quotes and brackets kept together."""
    words = re.findall(r"(?:\[[^\]]*\]|\"[^\"]*\"|'[^']*'|[^\s\"'\[])+", arguments)
    words = [word[1:-1] if word[0] == word[-1] and word[0] in "'\"" else word for word in words]
    return [word.replace('"', "").replace("'", "") if "," not in word else word for word in words]


@pytest.mark.parametrize(("page", "name", "arguments"), some(commands()), ids=lambda x: str(x)[:60])
def test_a_command_of_the_documentation_has_only_options_that_exist(page: str, name: str, arguments: str) -> None:
    options = [word for word in overrides(arguments) if "=" in word and not word.startswith("-")]
    if any(word.startswith(("hydra/launcher", "hydra/sweeper")) for word in options):
        pytest.skip("its plugin is an extra")
    if "--config-dir" in arguments and page == "extending.md":
        pytest.skip("tests/test_extending.py runs it")
    if "--config-dir" in arguments:  # where the reader's own options are
        options = [word for word in options if not word.startswith("experiment=")]
    sweep = "-m" in arguments.split()
    register()
    GlobalHydra.instance().clear()
    values = [w if not sweep or "[" in w else w.partition(",")[0] for w in options]
    values = [quote_argument(w) for w in values if not w.startswith("hydra.")]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        compose(NAMES[name], overrides=values)


def prose(page: Path) -> str:
    """The page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def anchors(page: Path) -> set[str]:
    """The anchors of a page: its headings, as GitHub and mkdocs spell them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_link_leads_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", prose(page)):
        if target.startswith("http"):
            continue
        target_page = page.parent / target if target else page
        assert target_page.exists(), target
        assert not anchor or anchor in anchors(target_page), f"{target}#{anchor}"


def test_the_tables_of_options_are_current() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "make_configuration.py"), "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
