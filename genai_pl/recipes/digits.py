"""Digits recipe: handwritten digits of scikit-learn (Alpaydin and Kaynak 1998), 8 x 8 in 17 grey levels, as text.

A model draws the digit that it is prompted with, one character per pixel; a classifier trained on real digits counts
how many it recognises.
"""

import gzip
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from genai_pl.recipes.fetch import GenerateTexts, from_pip, read_rows, write_parts
from genai_pl.recipes.pictures import from_text, grid, to_text, write_png

SIZE = 8
N_HELD = 180


def find(work: Path) -> list[Path]:
    """The file of all digits."""
    return from_pip("scikit-learn>=1.4", "sklearn", "sklearn/datasets/data/digits.csv.gz", work)


def read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Pictures (N, 8, 8) of levels 0 to 16 and their digits (N,), in a fixed random order."""
    with gzip.open(path, "rt") as file:
        table = np.loadtxt(file, delimiter=",").astype(np.int64)
    table = table[np.random.default_rng(0).permutation(len(table))]
    return table[:, :-1].reshape(-1, SIZE, SIZE), table[:, -1]


def prepare(files: list[Path], out: Path) -> str:
    """Write each digit as prompt and its picture as completion."""
    pictures, digits = read(files[0])
    rows = [
        {"prompt": str(digit), "completion": "\n" + to_text(picture)}
        for picture, digit in zip(pictures, digits, strict=True)
    ]
    return write_parts(out, rows, n_val=min(N_HELD, len(rows) // 10))


def show(generate: GenerateTexts, data: Path, out: Path) -> list[str]:
    """Write digits.png, a row of ten pictures for each digit; report how many a classifier recognises."""
    targets = [digit for digit in range(10) for _ in range(10)]
    pictures = [from_text(text, SIZE) for text in generate([str(digit) for digit in targets], 80)]
    write_png(out / "digits.png", grid([pictures[n : n + 10] for n in range(0, 100, 10)]))
    lines = [
        f"{out / 'digits.png'}: a row for each digit",
        f"{sum(d is not None for d in pictures)} of 100 are pictures",
    ]
    return [*lines, recognition_report(data, list(zip(pictures, targets, strict=True)))]


def recognition_report(data: Path, pictures: Sequence[tuple[np.ndarray | None, int]]) -> str:
    """A line on how many pictures an SVM, trained on real digits, takes for the digit that was asked for, and of real ones.

    pictures: each with its digit; None for a text that is no picture.
    """
    if importlib.util.find_spec("sklearn") is None:
        return "pip install scikit-learn: then it is also counted how many are recognised"
    from sklearn.svm import SVC

    parts = [read_rows(data / f"{part}.jsonl") for part in ("train", "val")]
    (x, y), (held_x, held_y) = (
        ([from_text(row["completion"], SIZE).ravel() for row in rows], [int(row["prompt"]) for row in rows])
        for rows in parts
    )
    classifier = SVC(gamma=0.001).fit(x, y)
    flat_pictures = [
        (picture.ravel(), digit) for picture, digit in pictures if picture is not None and picture.size == SIZE**2
    ]
    right = sum(classifier.predict([p])[0] == digit for p, digit in flat_pictures)
    return f"{right} of {len(pictures)} recognised by an SVM that is right on {classifier.score(held_x, held_y):.1%} of real ones"
