"""Draw recipe: captions and pictures in one stream of tokens, as in DALL-E (Ramesh et al. 2021).

One digit or two side by side, possibly inverted. One pair in five is never shown in training, so the report shows
whether the model composes what it learned of single digits.
"""

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
    """Whether the pair is left out of training; one in five is."""
    return (left + 2 * right) % 5 == 0


def caption(left: int, right: int | None = None, *, inverted: bool = False) -> str:
    """The caption of a picture of one or two digits.

    >>> caption(3, 8, inverted=True)
    'draw a three and an eight in white'
    """
    names = [("an " if digit == 8 else "a ") + NAMES[digit] for digit in (left, right) if digit is not None]
    return f"draw {' and '.join(names)}" + (" in white" if inverted else "")


def prepare(files: list[Path], out: Path) -> str:
    """Write captions as prompts and pictures as completions; held-out pairs are the validation."""
    pictures, labels = digits.read(files[0])
    of_digit = [pictures[labels == digit] for digit in range(10)]
    rng = np.random.default_rng(0)
    train, val = [], []
    while len(train) < N_ROWS or len(val) < N_HELD:
        # draw digits, layout and colour of the next picture
        left, right = (int(digit) for digit in rng.integers(10, size=2))
        single, inverted = rng.random() < 0.3, rng.random() < 0.2
        digits_shown = [left] if single else [left, right]
        picture = np.concatenate([rng.choice(of_digit[digit]) for digit in digits_shown], axis=1)
        picture = 16 - picture if inverted else picture
        row = {"prompt": caption(*digits_shown, inverted=inverted), "completion": "\n" + to_text(picture)}
        # held-out pairs go to the validation, all others train, until both are full
        part, limit = (val, N_HELD) if not single and is_held_out(left, right) else (train, N_ROWS)
        if len(part) < limit:
            part.append(row)
    n_train, n_val = write_rows(out / "train.jsonl", train), write_rows(out / "val.jsonl", val)
    digits.prepare(files, out / "digits")  # training data of the classifier
    return f"{n_train:,} rows in {out / 'train.jsonl'}, {n_val:,} of unseen pairs in {out / 'val.jsonl'}"


def show(generate: GenerateTexts, data: Path, out: Path) -> list[str]:
    """Write draw.png, a row of pictures for each caption; report how many digits of held-out pairs a classifier recognises."""
    held_out_pairs = [(left, right) for left in range(10) for right in range(10) if is_held_out(left, right)]
    captions = [caption(7), caption(3, inverted=True), *(caption(*pair) for pair in held_out_pairs[::3])]
    pictures = [from_text(text, SIZE) for text in generate([text for text in captions for _ in range(6)], 140)]
    write_png(out / "draw.png", grid([pictures[n : n + 6] for n in range(0, len(pictures), 6)], scale=5))
    lines = [f"{out / 'draw.png'}: a row for each of", *(f"  {text}" for text in captions)]
    pairs = [
        from_text(text, SIZE) for text in generate([caption(*pair) for pair in held_out_pairs for _ in range(2)], 140)
    ]
    digit_pairs = [pair for pair in held_out_pairs for _ in range(2)]
    # each half of a picture is one digit to be recognised
    halves = []
    for picture, pair in zip(pairs, digit_pairs, strict=True):
        parts = (None, None) if picture is None or picture.shape[1] != 2 * SIZE else np.split(picture, 2, axis=1)
        halves += zip(parts, pair, strict=True)
    return [*lines, f"pairs never seen in training: {digits.recognition_report(data / 'digits', halves)}"]
