"""The Triton kernels against the reference in float64, forward and backward; blocks are 32 by 32 in the interpreter."""

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need triton")

from flash import DEVICE, check, draw, inputs, ours_and_exact, relative_error
from torch import Tensor

from genai_pl.kernels import AttentionMask, ScoreOptions
from genai_pl.kernels.flash.operator import flash_attention
from tests.conftest import some


def integers(high: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def documents(*rows: str) -> Tensor:
    """Segment ids from "20a 15b 5.": lengths and letters, a dot for padding."""
    return torch.tensor(
        [[".abcdef".index(run[-1]) for run in row.split() for _ in range(int(run[:-1]))] for row in rows]
    )


PACKED = documents("25a 10b 5.", "3a 36b 1c")
LONG = documents("3a 100b 26c")
WILD = integers(4, 2, 40)  # the same id many times, with others and padding between
SHARED = documents("5. 20a 12b 3.", "5. 2. 33a")  # the first 5 keys belong to no document
RANKS = integers(12, 2, 40)  # with ties

MASKS = {
    "nothing": (AttentionMask(), {}),
    "causal": (AttentionMask(causal=True), {}),
    "causal, one": (AttentionMask(causal=True), {"T": 1}),
    "causal, odd": (AttentionMask(causal=True), {"T": 17}),
    "causal, long": (AttentionMask(causal=True), {"B": 1, "H": 1, "K": 1, "T": 129}),
    "causal, whole blocks": (AttentionMask(causal=True), {"B": 1, "T": 64}),
    "causal, more keys": (AttentionMask(causal=True), {"B": 1, "T": 20, "S": 70}),
    "causal, more queries: some see nothing": (AttentionMask(causal=True), {"B": 1, "T": 70, "S": 33}),
    "cross": (AttentionMask(), {"T": 33, "S": 50, "B": 1}),
    "window": (AttentionMask(window=9), {}),
    "causal window": (AttentionMask(causal=True, window=9), {"T": 70, "B": 1}),
    "window over blocks": (AttentionMask(window=70), {"B": 1, "H": 1, "K": 1, "T": 129}),
    "causal window over blocks": (AttentionMask(causal=True, window=75), {"B": 1, "H": 1, "K": 1, "T": 129}),
    "packed": (AttentionMask(causal=True, segments=PACKED), {}),
    "packed, both ways": (AttentionMask(segments=PACKED), {}),
    "packed, whole blocks inside": (AttentionMask(segments=LONG), {"B": 1, "H": 1, "K": 1, "T": 129}),
    "packed window": (AttentionMask(causal=True, window=7, segments=PACKED), {}),
    "many tiny documents": (AttentionMask(causal=True, segments=torch.arange(60)[None] // 3 + 1), {"B": 1, "T": 60}),
    "left padding": (AttentionMask(causal=True, segments=documents("7. 33a", "40a")), {}),
    "nothing but padding": (AttentionMask(segments=documents("40.", "40a")), {}),
    "one row of segments for all": (AttentionMask(segments=documents("9a 31b")), {}),
    "segments in any order": (AttentionMask(segments=WILD), {}),
    "segments in any order, causal": (AttentionMask(causal=True, segments=WILD), {}),
    "segments with a hole": (AttentionMask(segments=documents("50a 10b 69a")), {"B": 1, "H": 1, "K": 1, "T": 129}),
    "cross segments": (
        AttentionMask(segments=PACKED, query_segments=documents("5b 15a 3.", "20c 3a")),
        {"T": 23, "S": 40},
    ),
    "order": (AttentionMask(order=RANKS), {}),
    "strict order: the first ranks see nothing": (AttentionMask(order=RANKS, strict=True), {}),
    "order of packed": (AttentionMask(order=RANKS, strict=True, segments=PACKED, causal=True), {}),
    "order of the last queries": (AttentionMask(order=integers(99, 1, 50), strict=True), {"T": 18, "S": 50}),
    "prefix": (AttentionMask(causal=True, prefix=11), {}),
    "prefix of each row": (AttentionMask(causal=True, prefix=torch.tensor([0, 35])), {}),
    "prefix and a window away from it": (AttentionMask(causal=True, prefix=5, window=9), {"T": 70, "B": 1}),
    "shared keys, packed": (AttentionMask(causal=True, global_prefix=5, segments=SHARED), {"T": 35, "S": 40}),
    "shared keys, packed, both ways": (AttentionMask(global_prefix=5, segments=SHARED), {"T": 35, "S": 40}),
    "shared keys among the queries": (AttentionMask(causal=True, global_prefix=5, segments=SHARED), {}),
    "shared keys of each row": (AttentionMask(causal=True, global_prefix=torch.tensor([0, 5]), segments=SHARED), {}),
    "shared keys away from the documents": (
        AttentionMask(causal=True, global_prefix=3, segments=documents("3. 90a 36b")),
        {"B": 1, "H": 1, "K": 1, "T": 129},
    ),
    "shared keys and a window": (AttentionMask(causal=True, global_prefix=5, window=9), {"T": 70, "S": 75, "B": 1}),
    "shared keys, window both ways": (AttentionMask(global_prefix=40, window=9), {"T": 70, "B": 1}),
    "shared keys, window and packed": (AttentionMask(causal=True, global_prefix=5, window=4, segments=SHARED), {}),
    "shared keys, prefix and order": (AttentionMask(causal=True, global_prefix=5, prefix=9, segments=WILD, order=RANKS), {}),
    "shared keys of few queries": (
        AttentionMask(causal=True, global_prefix=5, segments=documents("5. 80a 30b")),
        {"B": 1, "H": 4, "K": 1, "T": 3, "S": 115},
    ),
    "more shared keys than there are": (AttentionMask(global_prefix=99, segments=SHARED), {}),
    "prefix longer than the keys": (AttentionMask(causal=True, prefix=99, segments=PACKED), {}),
}  # fmt: skip


@pytest.mark.parametrize("name", some(MASKS))
def test_every_mask_equals_the_reference(name: str):
    mask, sizes = MASKS[name]
    check(mask, inputs(**sizes))


@pytest.mark.parametrize(("H", "K", "T"), [(4, 2, 40), (4, 1, 40), (12, 1, 17)])
@pytest.mark.parametrize("n_processors", [1, 1000])  # a program per key head, or per query head
def test_query_heads_share_key_heads(monkeypatch, H: int, K: int, T: int, n_processors: int):
    monkeypatch.setattr("genai_pl.kernels.flash.launch.n_processors", lambda _: n_processors)
    check(AttentionMask(causal=True), inputs(B=1, H=H, K=K, T=T))


@pytest.mark.parametrize(("D", "D_V"), [(8, 8), (40, 40), (80, 80), (96, 96), (256, 256), (48, 32)])
def test_any_head_dim(D: int, D_V: int):
    check(AttentionMask(causal=True), inputs(B=1, T=40, D=D, D_V=D_V))


SLOPES = torch.tensor([0.5, 0.125])
SINKS = torch.tensor([1.5, -2.0])


@pytest.mark.parametrize(
    ("mask", "sizes", "options"),
    some(
        [
            (AttentionMask(causal=True), {}, {"scale": 0.7}),
            (AttentionMask(causal=True), {}, {"softcap": 2.0}),
            (AttentionMask(), {}, {"softcap": 50.0, "scale": 3.0}),
            (AttentionMask(causal=True), {}, {"alibi": SLOPES}),
            (AttentionMask(), {"B": 1, "T": 33, "S": 70}, {"alibi": SLOPES}),
            (AttentionMask(causal=True), {}, {"bias": draw(1, 2, 40, 40, seed=9)}),
            (AttentionMask(causal=True, window=9), {"T": 70, "B": 1}, {"sinks": SINKS}),
            (AttentionMask(causal=True, segments=PACKED), {"H": 4}, {"sinks": SINKS.repeat(2), "scale": 0.7}),
            (AttentionMask(segments=documents("40.", "40a")), {}, {"sinks": SINKS * 9}),  # rows that see the sink alone
            (AttentionMask(), {"T": 33, "S": 70}, {"bias": draw(2, 1, 1, 70, seed=9)}),
            (AttentionMask(segments=PACKED), {"H": 4}, {"bias": draw(40, 40, seed=9)}),
            (AttentionMask(order=RANKS), {}, {"bias": draw(2, 2, 40, 40, seed=9), "softcap": 2.0}),
            (
                AttentionMask(causal=True, window=30, segments=WILD, prefix=3, order=RANKS),
                {"H": 4, "D": 40},
                {
                    "bias": draw(1, 4, 1, 40, seed=9),
                    "softcap": 2.0,
                    "alibi": SLOPES.repeat(2),
                    "scale": 0.3,
                    "sinks": draw(4),
                },
            ),
        ]
    ),
)
def test_what_is_done_to_the_scores(mask: AttentionMask, sizes: dict, options: dict):
    check(mask, inputs(**sizes), **options)


@pytest.mark.parametrize(
    ("mask", "sizes", "options"),
    [
        (AttentionMask(causal=True), {"T": 1, "S": 140, "H": 12}, {}),
        pytest.param(AttentionMask(causal=True, window=40), {"T": 5, "S": 130, "H": 4}, {}, marks=pytest.mark.slow),
        (AttentionMask(causal=True, segments=documents("70. 30a", "100b")), {"T": 2, "S": 100, "H": 4}, {}),
        (AttentionMask(segments=documents("90.")), {"T": 3, "S": 90}, {}),
        (AttentionMask(causal=True, prefix=60), {"T": 4, "S": 90}, {"alibi": SLOPES}),
        (AttentionMask(causal=True, window=40), {"T": 5, "S": 130, "H": 4}, {"sinks": draw(4)}),
        (AttentionMask(causal=True), {"T": 4, "S": 90, "H": 4}, {"bias": draw(4, 4, 90), "sinks": 9 * draw(4)}),
        pytest.param(
            AttentionMask(causal=True), {"T": 4, "S": 90, "H": 4}, {"bias": draw(4, 4, 90)}, marks=pytest.mark.slow
        ),
    ],
)
@pytest.mark.parametrize("n_processors", [pytest.param(1, marks=pytest.mark.slow), 1000])
def test_few_queries_share_out_a_long_cache(monkeypatch, mask, sizes: dict, options: dict, n_processors: int):
    monkeypatch.setattr("genai_pl.kernels.flash.launch.n_processors", lambda _: n_processors)
    check(mask, inputs(B=mask.segments.shape[0] if mask.segments is not None else 1, **(sizes | {"K": 1})), **options)


def test_rows_that_see_nothing_are_zero_and_give_zero_gradient():
    mask = AttentionMask(causal=True, segments=documents("12. 28a", "40."))
    (o, lse, *gradients), _ = ours_and_exact(mask, inputs(), {})
    assert (lse[0, :, :12] == float("-inf")).all()
    for x in (o, *gradients):
        assert (x[1] == 0).all()
        assert (x[0, :, :12] == 0).all()
        assert x.isfinite().all()


def test_inputs_are_read_where_they_lie(monkeypatch):
    monkeypatch.setattr(Tensor, "contiguous", lambda _: pytest.fail("a copy was made"))
    wide = draw(2, 40, 3, 2, 48).float()
    q, k, v = (wide[:, :, n, :, 5:21].transpose(1, 2) for n in range(3))
    o, _ = flash_attention(q, k, v, AttentionMask(causal=True))
    monkeypatch.undo()
    packed = [x.clone(memory_format=torch.contiguous_format) for x in (q, k, v)]
    assert torch.equal(o, flash_attention(*packed, AttentionMask(causal=True))[0])
    assert o.transpose(1, 2).is_contiguous()
    turned = [x.mT.contiguous().mT for x in packed]  # gaps between the numbers of a row
    assert torch.equal(o, flash_attention(*turned, AttentionMask(causal=True))[0])


@pytest.mark.parametrize(("T", "S"), [(3, 50), (50, 50)])
@pytest.mark.parametrize("mask", [AttentionMask(), AttentionMask(causal=True, window=20)])
def test_what_lies_past_the_end_of_a_cache_is_not_read(mask: AttentionMask, T: int, S: int):
    def view(n: int, seed: int) -> Tensor:
        buffer = torch.full((1, 2, 128, 40), float("nan"), device=DEVICE)
        buffer[:, :, :n, :24] = draw(1, 2, n, 24, seed=seed).float()
        return buffer[:, :, :n, :24].requires_grad_()

    leaves = [view(n, seed) for seed, n in enumerate((T, S, S))]
    o, lse = flash_attention(*leaves, mask)
    d_o = view(T, 3).detach()
    assert all(x.isfinite().all() for x in (o, lse, *torch.autograd.grad(o, leaves, d_o)))


@pytest.mark.parametrize("sizes", [{"T": 0, "S": 3}, {"B": 0}])
def test_empty_inputs_give_empty_outputs(sizes: dict):
    q, k, v, _ = inputs(**{"T": 4, **sizes}) if sizes.get("T") != 0 else [draw(2, 2, n, 16) for n in (0, 3, 3, 0)]
    o, lse = flash_attention(q.float(), k.float(), v.float(), AttentionMask())
    assert (o.shape, lse.shape) == (q.shape, q.shape[:3])


def test_the_gradient_of_the_log_sum_exp_counts():
    from flash import exact_lse, on_device

    mask = on_device(AttentionMask(causal=True, segments=PACKED))
    tensors, weight = inputs(), draw(2, 2, 40, seed=7)
    weight = weight.masked_fill(on_device(mask).dense(40, 40).any(-1).logical_not(), 0.0)

    def total(attend, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in tensors[:3]]
        lse = attend(*leaves)
        return torch.autograd.grad((lse.masked_fill(lse.isinf(), 0.0) * weight.to(dtype)).sum(), leaves[:2])

    ours = total(lambda q, k, v: flash_attention(q, k, v, mask)[1], torch.float32)
    exact = total(lambda q, k, v: exact_lse(q, k, mask, {}), torch.float64)
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(ours, exact, strict=True))


def test_a_step_along_the_gradient_changes_the_output_as_it_says():
    tensors = [x.float() for x in inputs(B=1, T=33)]
    leaves = [x.clone().requires_grad_() for x in tensors[:3]]
    direction = [draw(*x.shape, seed=20 + n).float() for n, x in enumerate(leaves)]
    mask = AttentionMask(causal=True, window=20)

    def value(step: float) -> Tensor:
        moved = [x + step * d for x, d in zip(leaves, direction, strict=True)]
        return (flash_attention(*moved, mask, ScoreOptions(softcap=3.0))[0].double() * tensors[3]).sum()

    gradients = torch.autograd.grad(value(0.0), leaves)
    promised = sum((g * d).sum() for g, d in zip(gradients, direction, strict=True))
    with torch.no_grad():
        measured = (value(1e-2) - value(-1e-2)) / 2e-2
    assert measured.item() == pytest.approx(promised.item(), rel=1e-2)


@pytest.mark.parametrize("blocks", [(16, 64, 4, 1), pytest.param((64, 16, 4, 1), marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name", ["packed", "prefix of each row", "causal window", "segments in any order, causal", "shared keys, packed"]
)
def test_results_do_not_depend_on_the_blocks(monkeypatch, blocks: tuple, name: str):
    from genai_pl.kernels.flash.config import Blocks

    monkeypatch.setattr("genai_pl.kernels.flash.problem.launch_config", lambda *_: Blocks(*blocks))
    mask, sizes = MASKS[name]
    check(mask, inputs(**sizes))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["causal", pytest.param("packed, both ways", marks=pytest.mark.slow)])
def test_low_precision_is_within_twice_the_error_of_eager(dtype: torch.dtype, name: str):
    mask, sizes = MASKS[name]
    tensors = inputs(**sizes)
    ours, exact = ours_and_exact(mask, tensors, {}, dtype)

    def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        dense = mask.dense(40, 40).to(DEVICE)
        return (((q @ k.mT) * 16**-0.5).masked_fill(~dense, -1e4).softmax(-1) * dense) @ v

    leaves = [x.to(dtype).requires_grad_() for x in tensors[:3]]
    o = eager(*leaves)
    theirs = [o, *torch.autograd.grad(o, leaves, tensors[3].to(dtype))]
    for a, b, truth in zip([ours[0], *ours[2:]], theirs, [exact[0], *exact[2:]], strict=True):
        assert a.dtype == dtype
        assert (a - truth).abs().max() <= 2 * (b - truth).abs().max()
