import itertools
from dataclasses import replace

import pytest
import torch
from brute_force import visible

from genai_pl.kernels import AttentionMask, attention, positions_from_segments
from genai_pl.kernels.flash.mask_tables import GLOBAL_PREFIX, mask_tables

B = 2
SIZES = [(1, 1), (5, 5), (1, 6), (4, 6), (6, 4)]


def every_mask(T: int, S: int) -> list[AttentionMask]:
    """Every combination of features that can describe T queries and S keys."""
    generator = torch.Generator().manual_seed(T * 10 + S)

    def draw(high: int, length: int) -> torch.Tensor:
        return torch.randint(high, (B, length), generator=generator)

    segments = [{}, {"segments": draw(3, S), "query_segments": draw(3, T)}]
    orders = [{}]
    if T <= S:
        segments.append({"segments": draw(3, S)})
        orders += [{"order": draw(S, S)}, {"order": draw(S, S), "strict": True}]
    prefixes = [(None, None), (0, None), (2, None), (S, 1), (torch.tensor([1, 3]), None)]
    prefixes += [(None, 0), (None, 2), (1, S), (torch.tensor([3, 0]), torch.tensor([0, 2]))]
    return [
        AttentionMask(causal=causal, window=window, prefix=prefix, global_prefix=global_prefix, **segment, **order)
        for causal, window, (prefix, global_prefix), segment, order in itertools.product(
            (False, True), (None, 1, 3, 100), prefixes, segments, orders
        )
    ]


@pytest.mark.parametrize(("T", "S"), SIZES)
def test_every_combination_of_features_shows_what_its_words_say(T: int, S: int):
    for mask in every_mask(T, S):
        dense = mask.dense(T, S)
        assert dense.shape in [(1, 1, T, S), (B, 1, T, S)]
        assert torch.equal(dense.expand(B, 1, T, S), visible(mask, B, T, S)), mask


@pytest.mark.parametrize(("T", "S"), SIZES)
def test_a_mask_that_says_it_sees_all_or_is_plain_causal_does_so(T: int, S: int):
    for mask in every_mask(T, S):
        dense = visible(mask, B, T, S)
        if mask.sees_all(T, S):
            assert dense.all(), mask
        if mask.is_plain_causal(T, S):
            assert torch.equal(dense, torch.ones_like(dense).tril()), mask


@pytest.mark.parametrize(("T", "S"), SIZES)
def test_tables_bound_what_is_visible_from_outside_and_inside(T: int, S: int):
    for mask in every_mask(T, S):
        dense = visible(replace(mask, order=None, strict=False), B, T, S)[:, 0]
        tables = mask_tables(mask, T, S, dense.device)
        for table, rows in zip(tables, (dense, dense.mT), strict=True):
            if table is None:
                continue
            index = torch.arange(rows.shape[-1])
            bounds = table.expand(B, -1, -1)[..., None]
            seen = (index >= bounds[:, 0]) & (index < bounds[:, 1])
            if table is tables[0] and mask.global_prefix is not None:
                seen = seen | (index < bounds[:, GLOBAL_PREFIX])
            full = (index >= bounds[:, 2]) & (index < bounds[:, 3])
            assert (seen | ~rows).all(), mask
            assert (~full | rows).all(), mask


def test_tables_of_packed_documents_are_exact():
    segments = torch.tensor([[2, 2, 1, 1, 1, 3, 0, 0], [5, 5, 5, 5, 5, 5, 5, 5]])
    mask = AttentionMask(causal=True, segments=segments)
    starts = [[0, 0, 2, 2, 2, 5, 8, 8], [0] * 8]
    ends = [[1, 2, 3, 4, 5, 6, 0, 0], list(range(1, 9))]
    queries, _ = mask_tables(mask, 8, 8, segments.device)
    for first in (0, 2):  # the seen and the full part
        assert queries[:, first].tolist() == starts
        assert queries[:, first + 1].tolist() == ends


def test_layers_that_share_a_mask_build_it_once():
    mask = AttentionMask(causal=True, segments=torch.tensor([[1, 1, 2, 0]]))
    assert mask.dense(4, 4) is mask.dense(4, 4)
    additive = mask.additive(2, 4, torch.bfloat16)
    assert additive is mask.additive(2, 4, torch.bfloat16)
    assert torch.equal(additive == 0, mask.dense(2, 4))
    assert torch.equal(additive.isneginf(), ~mask.dense(2, 4))
    assert mask.dense(2, 4).shape[2] == 2
    assert mask.additive(2, 4, torch.float32).dtype == torch.float32


@pytest.mark.parametrize("backend", ["sdpa", "dense", "reference"])
def test_a_mask_first_used_in_inference_mode_can_be_trained_with(backend: str):
    mask = AttentionMask(causal=True, segments=torch.tensor([[1, 1, 2, 0]]))
    x = torch.randn(1, 1, 4, 8, requires_grad=True)
    with torch.inference_mode():
        attention(x, x, x, mask, backend=backend)
    attention(x, x, x, mask, backend=backend).sum().backward()


@pytest.mark.parametrize(
    ("mask", "T", "S", "expected"),
    [
        (AttentionMask(), 3, 5, True),
        (AttentionMask(causal=True), 1, 9, True),
        (AttentionMask(window=9), 9, 9, True),
        (AttentionMask(causal=True, window=9), 1, 9, True),
        (AttentionMask(causal=True, window=8), 1, 9, False),
        (AttentionMask(causal=True, prefix=9), 4, 9, True),
        (AttentionMask(causal=True, prefix=8), 4, 9, False),
        (AttentionMask(causal=True), 2, 9, False),
        (AttentionMask(causal=True, window=8, global_prefix=9), 4, 9, False),
        (AttentionMask(segments=torch.ones(1, 9, dtype=torch.long)), 9, 9, False),
    ],
)
def test_backends_learn_that_no_mask_is_needed(mask: AttentionMask, T: int, S: int, expected: bool):
    assert mask.sees_all(T, S) is expected


@pytest.mark.parametrize(
    ("mask", "T", "S", "expected"),
    [
        (AttentionMask(causal=True), 9, 9, True),
        (AttentionMask(causal=True, window=9), 9, 9, True),
        (AttentionMask(causal=True, window=8), 9, 9, False),
        (AttentionMask(causal=True), 4, 9, False),
        (AttentionMask(causal=True, prefix=1), 9, 9, False),
        (AttentionMask(causal=True, global_prefix=3), 9, 9, True),
        (AttentionMask(causal=True, order=torch.arange(9)[None]), 9, 9, False),
        (AttentionMask(), 9, 9, False),
    ],
)
def test_backends_learn_that_the_mask_is_a_plain_triangle(mask: AttentionMask, T: int, S: int, expected: bool):
    assert mask.is_plain_causal(T, S) is expected


def test_positions_restart_at_each_document_and_are_zero_in_padding():
    segments = torch.tensor([[1, 1, 1, 2, 2, 0, 0], [0, 0, 5, 5, 1, 1, 5]])
    expected = torch.tensor([[0, 1, 2, 0, 1, 0, 0], [0, 0, 0, 1, 0, 1, 0]])
    assert torch.equal(positions_from_segments(segments), expected)


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"window": 0}, "window"),
        ({"strict": True}, "order"),
        ({"query_segments": torch.ones(1, 2, dtype=torch.long)}, "segments"),
    ],
)
def test_fields_that_mean_nothing_together_are_refused(fields: dict, word: str):
    with pytest.raises(ValueError, match=word):
        AttentionMask(**fields)


def test_segments_of_another_length_are_refused_rather_than_broadcast():
    one = torch.ones(1, 1, dtype=torch.long)
    with pytest.raises(ValueError, match="segments has 1 entries, which cannot describe 4 queries and 4 keys"):
        AttentionMask(segments=one).dense(4, 4)
    with pytest.raises(ValueError, match="cannot describe 6 queries and 4 keys"):
        AttentionMask(order=torch.arange(4)[None]).dense(6, 4)


def test_rows_of_a_mask_are_those_of_the_whole() -> None:
    S, refused = 6, 0
    for mask in every_mask(S, S):
        whole = visible(mask, B, S, S)
        for start, end in ((0, 2), (2, 5), (5, 6)):
            both = mask.causal and mask.prefix is not None
            sided = mask.window is not None and (not mask.causal or both)
            if (
                mask.order is not None
                or mask.query_segments is not None
                or sided
                or (both and mask.global_prefix is not None)
            ):
                with pytest.raises(ValueError, match="rows of a mask"):
                    mask.rows(start, end, S)
                refused += 1
                continue
            rows, n_keys = mask.rows(start, end, S)
            assert torch.equal(
                rows.dense(end - start, n_keys).expand(B, -1, -1, -1), whole[:, :, start:end, :n_keys]
            ), mask
            assert not whole[:, :, start:end, n_keys:].any(), mask
            assert mask.rows(start, end, S)[0] is rows  # all layers share it, and what is built of it
    assert refused
