"""Fill in the middle: undone, counted, and never longer than the row."""

import numpy as np
import pytest
import torch

from genai_pl.objectives import CausalLMCollator, FimCollator
from tests.objectives.packed_rows import END, MIDDLE, PREFIX, SUFFIX, TEXT, VOCABULARY, row, rows


def collator(**options) -> FimCollator:
    return FimCollator(vocabulary=VOCABULARY, seed=0, **options)


def full_rows(batch: dict) -> tuple[np.ndarray, np.ndarray]:
    """The rows with their last token, which is only a label, and their segments."""
    last = batch["labels"][:, -1:]
    segments = batch.get("segment_ids", torch.ones_like(batch["input_ids"]))
    return torch.cat([batch["input_ids"], last], 1).numpy(), torch.cat([segments, segments[:, -1:]], 1).numpy()


def restored(document: list[int]) -> tuple[str, list[int]]:
    """The order a document is in, and its text: prefix, middle, suffix and, if it had one, the end token."""
    if PREFIX not in document:
        return "plain", document
    body, end = (document[:-1], [END]) if document[-1] == END else (document, [])
    suffix, middle = body.index(SUFFIX), body.index(MIDDLE)
    assert body[0] == PREFIX
    assert suffix < middle
    kind = "spm" if suffix == 1 else "psm"
    # SPM has the prefix before the middle, both after the last sentinel
    return kind, body[1:suffix] + body[middle + 1 :] + body[suffix + 1 : middle] + end


def test_documents_come_back_from_their_pieces_and_only_the_end_of_the_row_is_lost() -> None:
    given = rows(300, 101, documents=(30, 25, 20))
    ids, segments = full_rows(collator(fim_rate=0.5)(given))
    assert ids.shape == (300, 101)
    kinds = set()
    for r, row_ids, row_segments in zip(given, ids, segments, strict=True):
        documents = [row_ids[row_segments == s].tolist() for s in range(1, row_segments.max() + 1)]
        pairs = [restored(document) for document in documents]
        text = [token for _, document in pairs for token in document]
        n_moved = sum(kind != "plain" for kind, _ in pairs)
        assert text == r["input_ids"][: 101 - 3 * n_moved].tolist()
        kinds |= {kind for kind, _ in pairs}
    assert kinds == {"plain", "psm", "spm"}


def test_half_of_the_documents_are_rearranged_and_half_of_those_have_the_suffix_first() -> None:
    ids, _ = full_rows(collator()(rows(4000, 40)))
    moved = ids[:, 0] == PREFIX
    spm = moved & (ids[:, 1] == SUFFIX)
    assert abs(moved.sum() - 2000) < 5 * 1000**0.5
    # an empty prefix (a cut at 0 in one of 38 places, twice drawn) makes PSM look like SPM
    n, share = moved.sum(), 0.5 + 0.5 * (1 - (37 / 38) ** 2)
    assert abs(spm.sum() - share * n) < 5 * (n * share * (1 - share)) ** 0.5


def test_the_cuts_fall_anywhere_with_equal_chances() -> None:
    ids, _ = full_rows(collator(fim_rate=1.0, spm_rate=0.0)(rows(6000, 13)))  # 10 tokens and 3 sentinels
    middle = 12 - np.argmax(ids == MIDDLE, 1)
    # |i - j| for independent i and j uniform in 0..10
    for length in range(11):
        share = (11 if length == 0 else 2 * (11 - length)) / 121
        assert abs((middle == length).sum() - share * 6000) < 5 * (6000 * share * (1 - share)) ** 0.5


def test_without_rearranging_the_batch_is_the_causal_one() -> None:
    given = [*rows(5, 41, documents=(10, 12)), row(17, 5)]
    ours, causal = collator(fim_rate=0.0)(given), CausalLMCollator(vocabulary=VOCABULARY, seed=0)(given)
    assert ours.keys() == causal.keys()
    assert all(torch.equal(ours[key], causal[key]) for key in causal)


@pytest.mark.parametrize("documents", [(), (1,), (3, 3, 3), (5, 5, 5, 5), (16,), (18, 1)])
def test_a_row_keeps_its_length_whatever_its_documents(documents: tuple[int, ...]) -> None:
    for r in rows(40, 20, documents=documents):
        ids, segments = full_rows(collator(fim_rate=1.0)([r]))
        assert ids.shape == (1, 20)
        for sentinel in (PREFIX, MIDDLE, SUFFIX):
            where = segments[0][ids[0] == sentinel]
            assert len(where) == len(set(where.tolist()))  # one of a kind in a document
            # four tokens at least, and the sentinels: less is not worth cutting
            assert all((segments == document).sum() >= 7 for document in where)


def test_all_tokens_of_a_rearranged_document_are_predicted() -> None:
    batch = collator(fim_rate=1.0)(rows(3, 30))
    assert torch.equal(batch["labels"][:, :-1], batch["input_ids"][:, 1:])
    assert batch["targets"] == 3 * 29
    assert ((batch["input_ids"] < TEXT).sum(1) <= 27).all()
