"""German sentences and their English from Frank Richter's dictionary (Debian's trans-de-en, GPL): a model translates."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from genai_pl.recipes import pairs as shown
from genai_pl.recipes.fetch import GenerateTexts, Record, from_apt, write_parts

N_HELD = 500
LONGEST = 12  # words of a sentence: what a small model can learn
REMARK = re.compile(r"\s*(\{[^}]*\}|\[[^]]*\]|\([^)]*\)|/[^/ ]+/)")


def find(work: Path) -> list[Path]:
    """The dictionary."""
    return from_apt("trans-de-en", "usr/share/trans/de-en", work)


def pairs(lines: Iterable[str]) -> Iterator[tuple[str, str]]:
    """German and English: the first wording of each part of each entry, without remarks."""
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
    """Whether the text begins like a sentence, ends like one, and is not long."""
    return text[0].isupper() and text[-1] in ".!?" and 2 <= text.count(" ") < LONGEST


def prepare(files: list[Path], out: Path) -> str:
    """Write phrases and sentences as pairs of source and target; sentences alone are held back."""
    with files[0].open(encoding="utf-8") as file:
        found = dict(pairs(file))
    sentences = [pair for pair in found.items() if all(map(is_sentence, pair))]
    phrases = [(de, en) for de, en in found.items() if 2 <= de.count(" ") < 6 and de[-1] not in ".!?"]
    order = np.random.default_rng(0).permutation(len(sentences))
    rows: list[Record] = [{"source": de, "target": en} for de, en in [*phrases, *(sentences[n] for n in order)]]
    return write_parts(out, rows, held=min(N_HELD, len(sentences) // 10 + 1))


def show(generate: GenerateTexts, data: Path, out: Path) -> list[str]:
    """Held pairs with what the model writes, as pairs.md."""
    return shown.show(generate, data, out)
