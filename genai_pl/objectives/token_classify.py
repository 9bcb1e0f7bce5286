"""Token classification: tags of words, read at the first token of each word. Collator, entities of tag sequences, counts."""

from collections.abc import Sequence

import numpy as np
import torch

from genai_pl.objectives.collate import Batch, Collator, Example, pad_rows
from genai_pl.objectives.special_tokens import SpecialTokens
from genai_pl.objectives.token_loss import IGNORED

Entity = tuple[str, int, int]  # kind, first word, last word


class TagCollator(Collator):
    """input_ids, segment_ids and labels (B, T), -100 where no word begins, and targets, the number of words with a tag.

    Examples are {"input_ids": ids, "labels": tags}.
    """

    def __init__(self, *, vocabulary: SpecialTokens) -> None:
        self.pad = vocabulary.pad

    def __call__(self, rows: Sequence[Example]) -> Batch:
        labels = pad_rows([row["labels"] for row in rows], IGNORED)
        return {
            "input_ids": pad_rows([row["input_ids"] for row in rows], self.pad),
            "segment_ids": pad_rows([np.ones(len(row["input_ids"])) for row in rows], 0),
            "labels": labels,
            "targets": (labels != IGNORED).sum().float(),
        }


def entities(tags: Sequence[str]) -> set[Entity]:
    """The entities of a sequence of tags (BIO, also IOBES), as conlleval and seqeval's default mode find them.

    An entity begins at B and S, at an I or E behind O, another kind or an end, and ends before the next beginning, behind E
    and S, and before O. A tag without a prefix, such as LOC, is an I of that kind (Tjong Kim Sang and Buchholz 2000).

    >>> sorted(entities(["B-PER", "I-PER", "O", "I-LOC", "B-LOC"]))
    [('LOC', 3, 3), ('LOC', 4, 4), ('PER', 0, 1)]
    """
    found: set[Entity] = set()
    kind, start, ended = None, 0, True  # of the open entity; ended: the tag before was an E or S
    for n, tag in enumerate([*tags, "O"]):
        prefix, name = _split(tag)
        inside = prefix in ("I", "E") and name == kind and not ended
        if kind is not None and not inside:
            found.add((kind, start, n - 1))
            kind = None
        if prefix != "O" and not inside:
            kind, start = name, n
        ended = prefix in ("E", "S", "O")
    return found


def entity_counts(predicted: Sequence[str], true: Sequence[str]) -> np.ndarray:
    """(3,): entities that are found exactly, predicted ones, true ones."""
    ours, theirs = entities(predicted), entities(true)
    return np.array([len(ours & theirs), len(ours), len(theirs)])


def f1_of(found: torch.Tensor, predicted: torch.Tensor, true: torch.Tensor) -> dict[str, torch.Tensor]:
    """Precision, recall and F1 of entity counts; 0 where there is nothing to divide by."""
    total = (predicted + true).clamp(min=1)
    return {"precision": found / predicted.clamp(min=1), "recall": found / true.clamp(min=1), "f1": 2 * found / total}


def _split(tag: str) -> tuple[str, str]:
    """Prefix and kind of a tag.

    >>> _split("B-PER"), _split("O"), _split("LOC")
    (('B', 'PER'), ('O', ''), ('I', 'LOC'))
    """
    prefix, _, name = tag.partition("-")
    if prefix in ("B", "I", "E", "S"):
        return prefix, name or "_"
    return ("O", "") if tag == "O" else ("I", tag)
