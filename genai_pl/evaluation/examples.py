"""The rows that a model is measured on: what kind they are is told by their columns."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import Enum

from genai_pl.data import sources
from genai_pl.errors import DataError
from genai_pl.evaluation.choices import read_question


class Kind(Enum):
    """What rows are, and the columns by which that is known."""

    preferences = ("prompt", "chosen", "rejected")
    choices = ("prompt", "choices", "answer")
    questions = ("question", "choices", "answer")
    completions = ("prompt", "completion")
    text = ("text",)


def read_examples(
    path: str, *, column: str | None = None, last_word: bool = False, limit: int | None = None
) -> tuple[Kind, list[list]]:
    """The kind of the first `limit` rows, and their columns: those of the kind, or one of `Question`s.

    `column` names the column of a text. With `last_word` a text becomes a prompt and its last word the completion.
    """
    source = sources.shipped_validation(path) or sources.find(path)
    table = sources.read_table(source)
    if column is None and not last_word:
        kind = find_kind(path, table.column_names)
        names = kind.value
    else:
        kind, names = Kind.text, [column or "text"]
        sources.check_columns(source, table, {"data.column": names[0]})
    table = table.select_columns(list(names))
    if limit is not None:
        table = table.select(range(min(limit, len(table))))
    columns = [table[name][:] for name in names]
    with naming(path):
        if last_word:
            return Kind.completions, last_words(columns[0])
        if kind is Kind.questions:  # as ARC is asked
            columns[0] = [f"Question: {text}\nAnswer:" if isinstance(text, str) else text for text in columns[0]]
        if kind in (Kind.questions, Kind.choices):
            rows = enumerate(zip(*columns, strict=True), start=1)
            return Kind.choices, [[read_question(n, *row) for n, row in rows]]
    return kind, columns


def find_kind(path: str, found: Sequence[str]) -> Kind:
    """The first kind whose columns are all there; DataError names what is."""
    for kind in Kind:
        if set(kind.value) <= set(found):
            return kind
    raise DataError(
        f"data.path={path}: no column 'text', nor 'prompt' and 'completion'; found: {', '.join(found)} (set data.column)"
    )


def last_words(texts: Sequence[object]) -> list[list[str]]:
    """Each text up to its last word, and that with the whitespace before it (LAMBADA: Paperno et al. 2016).

    >>> last_words(["I met him at the docks"])
    [['I met him at the'], [' docks']]
    """
    prompts = []
    for n, text in enumerate(texts, start=1):
        if not isinstance(text, str):
            raise DataError(f"row {n}: text is {type(text).__name__}, not text")
        words = text.split()
        if len(words) < 2:
            raise DataError(f"row {n}: {len(words)} words; there is nothing to predict the last one from")
        prompts.append(text.rstrip()[: -len(words[-1])].rstrip())
    return [prompts, [text.rstrip()[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]]


@contextmanager
def naming(path: str) -> Iterator[None]:
    """Puts the option in front of what is wrong with a row."""
    try:
        yield
    except DataError as error:
        raise DataError(f"data.path={path}: {error}") from None
