"""Rows of documents: packed or padded rows (B, T) as rows of one document each, padded on the right.

Padding that follows a text changes nothing in a model whose tokens see earlier ones only. So a model that cannot be told
where documents begin (recurrent and convolution layers, attention of its own) computes packed rows exactly, for the price
of the padding. One pass is made whatever the documents, so that sharded models gather their weights equally often.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from genai_pl.kernels import positions_from_segments


class DocumentRows(NamedTuple):
    """The documents of packed rows, and the way back.

    index   (N, M), for each document and position the place of its token among the B * T of the packed rows
    places  (B, T), for each token its place among the N * M of the documents; 0 for padding
    lengths (N,), tokens of each document
    """

    index: Tensor
    places: Tensor
    lengths: Tensor

    def split(self, tokens: Tensor) -> Tensor:
        """Documents (N, M) of packed tokens (B, T)."""
        return tokens.flatten()[self.index]

    def join(self, hidden: Tensor) -> Tensor:
        """Hidden states (B, T, C) of the packed rows from those of the documents (N, M, C)."""
        return hidden.flatten(0, 1)[self.places]


def document_rows(segments: Tensor) -> DocumentRows:
    """The documents of rows with these segment ids (B, T), where 0 is padding and a new number begins a document.

    >>> rows = document_rows(torch.tensor([[0, 1, 1, 2]]))
    >>> rows.index.tolist(), rows.places.tolist()
    ([[1, 2], [3, 0]], [[0, 0, 1, 2]])
    """
    positions, is_text = positions_from_segments(segments), segments != 0
    # documents are numbered over all rows; padding is of none
    number = (is_text & (positions == 0)).flatten().cumsum(0).view_as(segments) - 1
    n, longest = max(int(number.max()) + 1, 1), int(positions.max()) + 1
    places = (number * longest + positions).masked_fill(~is_text, 0)
    index = torch.zeros(n * longest, dtype=torch.long, device=segments.device)
    index[places[is_text]] = is_text.flatten().nonzero()[:, 0]
    lengths = torch.bincount(number[is_text], minlength=n)
    return DocumentRows(index.view(n, longest), places, lengths)
