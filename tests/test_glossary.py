"""One word for one thing: the names that docs/glossary.md retires stand nowhere in the package."""

import io
import re
import tokenize
from pathlib import Path

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


def test_no_identifier_is_a_retired_word() -> None:
    retired = {str(path.relative_to(ROOT)): names(path) & RETIRED for path in FILES}
    assert {path: words for path, words in retired.items() if words} == {}


def test_explanations_use_the_words_of_the_field() -> None:
    paths = [*FILES, *sorted((ROOT / "conf").rglob("*.yaml"))]
    phrases = {str(path.relative_to(ROOT)): PHRASES.findall(path.read_text()) for path in paths}
    assert {path: found for path, found in phrases.items() if found} == {}


def test_a_module_docstring_begins_with_the_noun_of_the_thing() -> None:
    begins = re.compile(r'"""(?!(What|Who|Whose|Which|How|Where|When|Whether)\b)')
    assert [str(path.relative_to(ROOT)) for path in FILES if not begins.match(path.read_text())] == []


def test_the_glossary_names_files_that_exist() -> None:
    paths = {path for row in ROWS for path in re.findall(r"`(genai_pl/[\w/.]+)`", "|".join(row))}
    assert len(paths) > 30
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []
