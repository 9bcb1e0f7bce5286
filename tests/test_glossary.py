"""One word for one thing: the names that docs/glossary.md retires stand nowhere in the package."""

import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
GLOSSARY = (ROOT / "docs" / "glossary.md").read_text()
ROWS = [line.strip("|").split("|") for line in GLOSSARY.splitlines() if line.startswith("| ")]
RETIRED = {name for row in ROWS for name in re.findall(r"`([A-Za-z_]\w*)`", row[-1])}
FILES = sorted((ROOT / "genai_pl").rglob("*.py"))
# phrases of docstrings and of comments in conf/ that say a thing of the field in words of our own
PHRASES = re.compile(r"\bin pieces\b|\blets go of\b|\bis told of\b|\bwho sees whom\b|\bcomes of it\b", re.IGNORECASE)


def names(path: Path) -> set[str]:
    """The identifiers of a file."""
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text()).readline)
    return {token.string for token in tokens if token.type == tokenize.NAME}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_identifier_is_a_retired_word(path: Path) -> None:
    assert not names(path) & RETIRED


@pytest.mark.parametrize(
    "path", [*FILES, *sorted((ROOT / "conf").rglob("*.yaml"))], ids=lambda p: str(p.relative_to(ROOT))
)
def test_explanations_use_the_words_of_the_field(path: Path) -> None:
    assert PHRASES.findall(path.read_text()) == []


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_module_docstring_begins_with_the_noun_of_the_thing(path: Path) -> None:
    text = path.read_text()
    assert text.startswith('"""'), "no docstring"
    assert not re.match(r'"""(What|Who|Whose|Which|How|Where|When|Whether)\b', text)


def test_the_glossary_names_files_that_exist() -> None:
    paths = {path for row in ROWS for path in re.findall(r"`(genai_pl/[\w/.]+)`", "|".join(row))}
    assert len(paths) > 30
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []
