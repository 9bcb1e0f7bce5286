"""Duplicates: rows that repeat an earlier one, exactly or nearly, and the rows that are left without them.

Exact duplicates have equal cells in all columns. Near duplicates share at least THRESHOLD of their shingles, runs of
SHINGLE words (Broder 1997): MinHash with bands (Leskovec, Rajaraman and Ullman 2020, chapter 3) finds candidates, and their
shingles are then compared, so that none is removed by an estimate. Repeated examples make a model memorize, and where they
are in both training and validation rows they make the loss too good (Lee et al. 2022).
"""

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from genai_pl.errors import ConfigError
from genai_pl.progress import progress_bar

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger(__name__)

MODES = ("exact", "near")
THRESHOLD = 0.8  # Jaccard similarity of near duplicates
SHINGLE = 5  # words
PERMUTATIONS, BANDS = (
    128,
    16,
)  # 16 bands of 8: a pair of similarity 0.8 is missed in 5 of 100 cases, one of 0.9 in 1 of 8,000
WORD = re.compile(r"\w+")
BATCH = 1000


def check_mode(mode: str | None) -> None:
    """ConfigError for an unknown mode, and for near duplicates without the library that finds them."""
    if mode not in (None, *MODES):
        raise ConfigError(f"data.deduplicate={mode}: one of null, {', '.join(MODES)}")
    if mode == "near":
        try:
            import rensa  # noqa: F401
        except ImportError:
            raise ConfigError("data.deduplicate=near finds duplicates with rensa: pip install -e '.[dedup]'") from None


def without_duplicates(table: "Dataset", mode: str | None, *, name: str) -> "Dataset":
    """The table without rows that repeat an earlier one; the log says how many. name: of the source."""
    if mode is None or not len(table):
        return table
    kept = unique_rows([table]) if mode == "exact" else distinct_rows(table)
    n = len(table) - len(kept)
    log.info("data        %s: %s of %s rows are %s duplicates: left out", name, f"{n:,}", f"{len(table):,}", mode)
    return table.select(kept, keep_in_memory=True) if n else table


def unique_rows(tables: Sequence["Dataset"]) -> np.ndarray:
    """The numbers, from 0 through all tables, of the rows that are not equal to an earlier one."""
    seen: set[bytes] = set()
    kept = []
    for number, cells in enumerate(cells for table in tables for cells in _cells(table)):
        # digests: the texts of all rows may be larger than memory
        key = hashlib.blake2b(repr(cells).encode("utf-8", "surrogatepass"), digest_size=16).digest()
        if key not in seen:
            seen.add(key)
            kept.append(number)
    return np.asarray(kept, dtype=np.int64)


def distinct_rows(table: "Dataset") -> np.ndarray:
    """The numbers of the rows that are not near duplicates of an earlier one that is kept."""
    from rensa import RMinHash, RMinHashLSH

    index = RMinHashLSH(threshold=THRESHOLD, num_perm=PERMUTATIONS, num_bands=BANDS)
    kept: list[int] = []
    with progress_bar(len(table), "near duplicates") as bar:
        for number, cells in enumerate(_cells(table)):
            words = shingles(cells)
            sketch = RMinHash(num_perm=PERMUTATIONS, seed=0)
            sketch.update(sorted(words))
            if not any(similarity(words, shingles(_row(table, other))) >= THRESHOLD for other in index.query(sketch)):
                index.insert(number, sketch)
                kept.append(number)
            bar.update()
    return np.asarray(kept, dtype=np.int64)


def shingles(cells: Sequence[object]) -> set[str]:
    """The runs of SHINGLE words of a row's texts, in small letters; a shorter text is one shingle.

    >>> sorted(shingles(["a b c d e f"]))
    ['a b c d e', 'b c d e f']
    """
    words = WORD.findall(" ".join(map(_plain, cells)).lower())
    return {" ".join(words[n : n + SHINGLE]) for n in range(max(len(words) - SHINGLE + 1, 1))}


def similarity(a: set[str], b: set[str]) -> float:
    """The Jaccard similarity of two sets: the share of their union that both have (two empty ones are equal)."""
    return len(a & b) / len(a | b) if a or b else 1.0


def _plain(cell: object) -> str:
    """The words of a cell; JSON cells hold texts or messages, whose keys are no words."""
    if not isinstance(cell, str):
        return str(cell)
    try:
        value = json.loads(cell)
    except ValueError:
        return cell
    return " ".join(_texts(value)) if isinstance(value, list | str | dict) else cell


def _texts(value: object) -> Iterator[str]:
    """The texts inside a value of JSON; of objects only what their keys hold."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)


def _cells(table: "Dataset") -> Iterator[tuple]:
    """The cells of each row but the number of the row."""
    names = [name for name in table.column_names if name != "row"]
    for batch in table.select_columns(names).iter(BATCH):
        yield from zip(*(batch[name] for name in names), strict=True)


def _row(table: "Dataset", number: int) -> tuple:
    """The cells of one row but its number."""
    return tuple(value for name, value in table[number].items() if name != "row")
