"""Sizes of training rows in tokens and in examples, by which the sources of a mixture are weighed."""

from collections.abc import Sequence

import numpy as np
from torch.utils.data import Dataset

from genai_pl.data.packing import PackedExamples, PackedPairs, PackedRows


def row_tokens(rows: Dataset) -> np.ndarray | int:
    """Tokens of each row (N,), or one number where all have equally many; padding does not count."""
    if isinstance(rows, PackedRows | PackedExamples | PackedPairs):
        return rows.row_tokens()
    if isinstance(rows, list):
        return np.asarray([sum(map(_n_tokens, row.values())) for row in rows], np.int64)
    # a table of lists of tokens, one column for each text of a row
    import pyarrow.compute as pc

    columns = rows.with_format("arrow")[:]
    return sum(pc.list_value_length(columns[name]).to_numpy() for name in columns.column_names)


def row_examples(rows: Dataset) -> np.ndarray | int:
    """Examples of each row (N,): those that were packed into it, and 1 for a row of text or of a table."""
    if isinstance(rows, PackedExamples | PackedPairs):
        return np.asarray([len(row) for row in rows.bins], np.int64)
    return 1


def _n_tokens(value: object) -> int:
    """Tokens of one field of a row: of an array of ids, or of a list of such arrays; other fields have none."""
    if isinstance(value, np.ndarray):
        return len(value) if value.ndim == 1 and np.issubdtype(value.dtype, np.integer) else 0
    is_list = isinstance(value, Sequence) and not isinstance(value, str)
    return sum(map(_n_tokens, value)) if is_list and all(isinstance(part, np.ndarray) for part in value) else 0
