"""Captions and pictures in one stream of tokens, as DALL-E has them (Ramesh et al. 2021): digits alone, or two side by side."""

from pathlib import Path

import numpy as np

from genai_pl.recipes import digits
from genai_pl.recipes.fetch import write_rows
from genai_pl.recipes.pictures import to_text

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
N_ROWS = 12000
N_HELD = 300
find = digits.find


def unseen(left: int, right: int) -> bool:
    """Whether the pair is never shown in training: one in five is not."""
    return (left + 2 * right) % 5 == 0


def caption(left: int, right: int | None = None, *, inverted: bool = False) -> str:
    """What to draw, in words."""
    named = [("an " if digit == 8 else "a ") + NAMES[digit] for digit in (left, right) if digit is not None]
    return f"draw {' and '.join(named)}" + (" in white" if inverted else "")


def prepare(files: list[Path], out: Path) -> str:
    """Write captions as prompts and pictures as completions; pairs that are `unseen` are held back for validation."""
    pictures, labels = digits.read(files[0])
    of_digit = [pictures[labels == digit] for digit in range(10)]
    rng = np.random.default_rng(0)
    train, held = [], []
    while len(train) < N_ROWS or len(held) < N_HELD:
        left, right = (int(digit) for digit in rng.integers(10, size=2))
        alone, inverted = rng.random() < 0.3, rng.random() < 0.2
        shown = [left] if alone else [left, right]
        picture = np.concatenate([rng.choice(of_digit[digit]) for digit in shown], axis=1)
        picture = 16 - picture if inverted else picture
        row = {"prompt": caption(*shown, inverted=inverted), "completion": "\n" + to_text(picture)}
        part, most = (held, N_HELD) if not alone and unseen(left, right) else (train, N_ROWS)
        if len(part) < most:
            part.append(row)
    n_train, n_val = write_rows(out / "train.jsonl", train), write_rows(out / "val.jsonl", held)
    return f"{n_train:,} rows in {out / 'train.jsonl'}, {n_val:,} of unseen pairs in {out / 'val.jsonl'}"
