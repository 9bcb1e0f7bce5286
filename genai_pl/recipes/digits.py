"""Handwritten digits of scikit-learn (Alpaydin and Kaynak 1998), 8 x 8 in 17 grey levels: a model draws the digit it is told."""

import gzip
from pathlib import Path

import numpy as np

from genai_pl.recipes.fetch import from_pip, write_parts
from genai_pl.recipes.pictures import to_text

SIZE = 8
N_HELD = 180


def find(work: Path) -> list[Path]:
    """The file of all digits."""
    return from_pip("scikit-learn>=1.4", "sklearn", "sklearn/datasets/data/digits.csv.gz", work)


def read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Pictures (N, 8, 8) of levels 0 to 16 and their digits (N,), in an order drawn once."""
    with gzip.open(path, "rt") as file:
        table = np.loadtxt(file, delimiter=",").astype(np.int64)
    table = table[np.random.default_rng(0).permutation(len(table))]
    return table[:, :-1].reshape(-1, SIZE, SIZE), table[:, -1]


def prepare(files: list[Path], out: Path) -> str:
    """Write the digit as prompt and its picture as completion."""
    pictures, digits = read(files[0])
    rows = [
        {"prompt": str(digit), "completion": "\n" + to_text(picture)}
        for picture, digit in zip(pictures, digits, strict=True)
    ]
    return write_parts(out, rows, held=min(N_HELD, len(rows) // 10))
