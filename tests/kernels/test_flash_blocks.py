"""Blocks that the kernels visit, against the mask written out: none too few, none too many, every full one as full."""

import itertools

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need triton")

import triton
import triton.language as tl
from flash import DEVICE
from torch import Tensor

from genai_pl.kernels import AttentionMask
from genai_pl.kernels.flash.blocks import clip, key_blocks, query_blocks, walk
from genai_pl.kernels.flash.common import Features, Sizes
from genai_pl.kernels.flash.mask_tables import mask_tables
from tests.conftest import some

BLOCK = 4
LENGTHS = (1, 3, 4, 6, 9)


@triton.jit
def probe(OUT, table, sizes, OF_KEYS: tl.constexpr, F: tl.constexpr):
    """(start, full_start, full_end, end, edges, full blocks) of every block of rows."""
    block = tl.program_id(0)
    blocks = query_blocks(block * 4, table, sizes, F) if OF_KEYS else key_blocks(block * 4, table, sizes, F)
    for n in tl.static_range(4):
        tl.store(OUT + block * 6 + n, blocks[n])
    tl.store(OUT + block * 6 + 4, walk(blocks, 4, True)[1])
    tl.store(OUT + block * 6 + 5, walk(blocks, 4, False)[1])


@triton.jit
def probe_clip(OUT, start, full_start, full_end, end, first, last):
    blocks = clip((start, full_start, full_end, end), first, last)
    tl.store(OUT, walk(blocks, 4, True)[1])
    tl.store(OUT + 1, walk(blocks, 4, False)[1])


def visited(mask: AttentionMask, T: int, S: int, *, of_keys: bool) -> list[list[int]]:
    tables = mask_tables(mask, T, S, torch.device(DEVICE))
    table = tables[of_keys]
    F = Features(
        D=16, D_V=16, BLOCK_D=16, BLOCK_D_V=16, BLOCK_M=BLOCK, BLOCK_N=BLOCK, causal=mask.causal,
        window=mask.window is not None, prefix=mask.prefix is not None, segments=mask.segments is not None,
    )  # fmt: skip
    n_blocks = triton.cdiv(S if of_keys else T, BLOCK)
    out = torch.zeros(n_blocks, 6, dtype=torch.int32, device=DEVICE)
    probe[(n_blocks,)](out, table, Sizes(T, S, 1, 1, T, T, mask.window or 0, 0, 0), of_keys, F)
    return out.tolist()


def blocks_of(rows: Tensor) -> tuple[list[int], list[int]]:
    """The blocks of columns in which these rows see something, and those that they see whole."""
    chunks = [rows[:, n : n + BLOCK] for n in range(0, rows.shape[1], BLOCK)]
    some = [n for n, chunk in enumerate(chunks) if chunk.any()]
    return some, [n for n in some if chunks[n].all() and chunks[n].shape[1] == BLOCK]


@pytest.mark.parametrize("window", some([None, 1, 2, 5, 6]))
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_every_block_that_is_seen_is_visited_and_no_other(causal: bool, window: int | None, packed: bool):
    for (T, S), of_keys in itertools.product(itertools.product(LENGTHS, LENGTHS), (False, True)):
        if packed and T > S:
            continue
        segments = (torch.arange(S)[None] // 7 + 1).to(DEVICE) if packed else None
        mask = AttentionMask(causal=causal, window=window, segments=segments)
        dense = mask.dense(T, S, torch.device(DEVICE))[0, 0]
        rows = dense.mT if of_keys else dense
        for n, (start, full_start, full_end, _, edges, full) in enumerate(visited(mask, T, S, of_keys=of_keys)):
            some, whole = blocks_of(rows[n * BLOCK : (n + 1) * BLOCK])
            assert list(range(full_start // BLOCK, full_end // BLOCK)) == whole, (mask, T, S, of_keys, n)
            assert (edges, full) == (len(some) - len(whole), len(whole)), (mask, T, S, of_keys, n)
            assert not some or start == some[0] * BLOCK


def test_splits_of_the_keys_visit_every_block_once():
    for start, full_start, full_end, end in [
        (0, 8, 24, 31),
        (4, 4, 4, 19),
        (8, 12, 12, 12),
        (16, 16, 16, 0),
        (0, 0, 32, 32),
    ]:
        total = torch.zeros(2, dtype=torch.int32)
        for first in range(0, 36, 12):
            out = torch.zeros(2, dtype=torch.int32, device=DEVICE)
            probe_clip[(1,)](out, start, full_start, full_end, end, first, first + 12)
            total += out.cpu()
        n_edges = max(full_start - start, 0) // BLOCK + max(-(-(end - full_end) // BLOCK), 0)
        assert total.tolist() == [n_edges, (full_end - full_start) // BLOCK]
