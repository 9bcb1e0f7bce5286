"""Translation recipe: German and English from Frank Richter's dictionary (Debian's trans-de-en, GPL).

Phrases and sentences train, and other sentences validate.
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from genai_pl.recipes import pairs as shown
from genai_pl.recipes.fetch import GenerateTexts, Record, from_apt, write_parts

N_HELD = 500
LONGEST = 12  # words of a sentence that a small model can learn
REMARK = re.compile(r"\s*(\{[^}]*\}|\[[^]]*\]|\([^)]*\)|/[^/ ]+/)")


def find(work: Path) -> list[Path]:
    """The dictionary."""
    return from_apt("trans-de-en", "usr/share/trans/de-en", work)


def pairs(lines: Iterable[str]) -> Iterator[tuple[str, str]]:
    """German and English of each part of each entry: the first wording, without remarks.

    >>> list(pairs(["Hund {m}; Köter | Katze {f} :: dog | cat"]))
    [('Hund', 'dog'), ('Katze', 'cat')]
    """
    for line in lines:
        german, _, english = line.rstrip("\n").partition(" :: ")
        sides = [side.split(" | ") for side in (german, english)]
        if line.startswith("#") or len(sides[0]) != len(sides[1]):
            continue
        for pair in zip(*sides, strict=True):
            de, en = (re.split(r"; ", REMARK.sub("", text).strip())[0].strip() for text in pair)
            if de and en:
                yield de, en


def is_sentence(text: str) -> bool:
    """Whether a text begins and ends like a sentence and is short."""
    return text[0].isupper() and text[-1] in ".!?" and 2 <= text.count(" ") < LONGEST


def prepare(files: list[Path], out: Path) -> str:
    """Write phrases and sentences as pairs of source and target; only sentences validate."""
    with files[0].open(encoding="utf-8") as file:
        translations = dict(pairs(file))
    sentences = [pair for pair in translations.items() if all(map(is_sentence, pair))]
    phrases = [(de, en) for de, en in translations.items() if 2 <= de.count(" ") < 6 and de[-1] not in ".!?"]
    order = np.random.default_rng(0).permutation(len(sentences))
    rows: list[Record] = [{"source": de, "target": en} for de, en in [*phrases, *(sentences[n] for n in order)]]
    return write_parts(out, rows, n_val=min(N_HELD, len(sentences) // 10 + 1))


def show(generate: GenerateTexts, data: Path, out: Path) -> list[str]:
    """Write pairs.md and report scores."""
    return shown.show(generate, data, out)
