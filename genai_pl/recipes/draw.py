"""Captions and pictures in one stream of tokens, as DALL-E has them (Ramesh et al. 2021): digits alone, or two side by side."""

from pathlib import Path

import numpy as np

from genai_pl.recipes import digits
from genai_pl.recipes.digits import SIZE
from genai_pl.recipes.fetch import GenerateTexts, write_rows
from genai_pl.recipes.pictures import from_text, grid, to_text, write_png

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
N_ROWS = 12000
N_HELD = 300
find = digits.find


def is_held_out(left: int, right: int) -> bool:
    """Whether the pair is never shown in training: one in five is not."""
    return (left + 2 * right) % 5 == 0


def caption(left: int, right: int | None = None, *, inverted: bool = False) -> str:
    """What to draw, in words."""
    named = [("an " if digit == 8 else "a ") + NAMES[digit] for digit in (left, right) if digit is not None]
    return f"draw {' and '.join(named)}" + (" in white" if inverted else "")


def prepare(files: list[Path], out: Path) -> str:
    """Write captions as prompts and pictures as completions; pairs that are held out are held back for validation."""
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
        part, most = (held, N_HELD) if not alone and is_held_out(left, right) else (train, N_ROWS)
        if len(part) < most:
            part.append(row)
    n_train, n_val = write_rows(out / "train.jsonl", train), write_rows(out / "val.jsonl", held)
    digits.prepare(files, out / "digits")  # for the classifier that judges
    return f"{n_train:,} rows in {out / 'train.jsonl'}, {n_val:,} of unseen pairs in {out / 'val.jsonl'}"


def show(generate: GenerateTexts, data: Path, out: Path) -> list[str]:
    """Pictures of captions as draw.png, a row a caption, and how many digits of unseen pairs a classifier recognises."""
    new = [(left, right) for left in range(10) for right in range(10) if is_held_out(left, right)]
    named = [caption(7), caption(3, inverted=True), *(caption(*pair) for pair in new[::3])]
    drawn = [from_text(text, SIZE) for text in generate([text for text in named for _ in range(6)], 140)]
    write_png(out / "draw.png", grid([drawn[n : n + 6] for n in range(0, len(drawn), 6)], scale=5))
    lines = [f"{out / 'draw.png'}: a row for each of", *(f"  {text}" for text in named)]
    pairs = [from_text(text, SIZE) for text in generate([caption(*pair) for pair in new for _ in range(2)], 140)]
    asked = [pair for pair in new for _ in range(2)]
    halves = []
    for picture, pair in zip(pairs, asked, strict=True):
        parts = (None, None) if picture is None or picture.shape[1] != 2 * SIZE else np.split(picture, 2, axis=1)
        halves += zip(parts, pair, strict=True)
    return [*lines, f"pairs never seen in training: {digits.recognition_report(data / 'digits', halves)}"]
