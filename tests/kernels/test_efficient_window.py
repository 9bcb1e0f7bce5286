"""Window attention with global positions against masks written out by hand."""

import pytest
import torch
from dense_attention import attend, gradients, packed, qkv, shown
from largest_tensor import LargestTensor
from torch import Tensor

from genai_pl.errors import ConfigError
from genai_pl.kernels import AttentionMask, ScoreOptions
from genai_pl.kernels.efficient import WindowAttention

S = 200  # more than two blocks of the shortest length
PACKED = torch.cat([packed(70, 90, padding=40), packed(1, 150, 49)])
SIZES = [(1, 0), (5, 0), (5, 3), (70, 10), (100, 1), (300, 2), (7, 199), (7, 300)]


def expected_mask(T: int, *, window: int, n_global: int, causal: bool, segments: Tensor | None) -> Tensor:
    query, key = torch.arange(S - T, S)[:, None], torch.arange(S)
    near = ((query - key).abs() < window) | (key < n_global) | (query < n_global)
    return near & shown(T, S, causal=causal, segments=segments)


@pytest.mark.parametrize("backend", ["sdpa", "dense", "reference"])
@pytest.mark.parametrize("segments", [None, PACKED], ids=["", "packed"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("T", [S, S - 5, 20, 1])
def test_it_is_attention_under_the_mask_written_by_hand(T: int, causal: bool, segments: Tensor | None, backend: str):
    q, k, v = qkv(T, S)
    for window, n_global in SIZES:
        kind = WindowAttention(window=window, n_global=n_global, backend=backend)
        visible = expected_mask(T, window=window, n_global=n_global, causal=causal, segments=segments)
        y = kind(q, k, v, AttentionMask(causal=causal, segments=segments), ScoreOptions(scale=0.7))
        torch.testing.assert_close(y, attend(q, k, v, visible, scale=0.7))


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_are_those_of_the_dense_mask(causal: bool):
    leaves = [x.requires_grad_() for x in qkv(S)]
    visible = expected_mask(S, window=9, n_global=3, causal=causal, segments=PACKED)
    kind = WindowAttention(window=9, n_global=3, backend="auto")
    ours = gradients(kind(*leaves, AttentionMask(causal=causal, segments=PACKED)), leaves)
    torch.testing.assert_close(ours, gradients(attend(*leaves, visible), leaves))


@pytest.mark.parametrize("T", [S, 20])
def test_a_mask_may_serve_kinds_of_different_sizes_in_turn(T: int):
    q, k, v = qkv(T, S)
    mask = AttentionMask(causal=True, segments=PACKED)
    for window, n_global in [(5, 3), (9, 0), (5, 190), (5, 3)]:
        visible = expected_mask(T, window=window, n_global=n_global, causal=True, segments=PACKED)
        y = WindowAttention(window=window, n_global=n_global, backend="auto")(q, k, v, mask)
        torch.testing.assert_close(y, attend(q, k, v, visible))


@pytest.mark.parametrize("causal", [False, True])
def test_triton_gives_the_same(causal: bool):
    pytest.importorskip("triton", reason="the kernels need triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    q, k, v = qkv(S, B=1, H=2, K=1, D=16, dtype=torch.float32)
    kind = WindowAttention(window=9, n_global=3, backend="triton")
    y = kind(*(x.to(device) for x in (q, k, v)), AttentionMask(causal=causal)).cpu()
    visible = expected_mask(S, window=9, n_global=3, causal=causal, segments=None)
    torch.testing.assert_close(y.double(), attend(*(x.double() for x in (q, k, v)), visible), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_packed_documents_are_alone_and_only_the_first_has_the_global_positions(causal: bool):
    q, k, v = qkv(S)
    y = WindowAttention(window=9, n_global=3, backend="auto")(
        q, k, v, AttentionMask(causal=causal, segments=packed(60, 140).expand(2, -1))
    )
    for part, n_global in ((slice(0, 60), 3), (slice(60, S), 0)):
        kind = WindowAttention(window=9, n_global=n_global, backend="auto")
        alone = kind(*(x[:, :, part] for x in (q, k, v)), AttentionMask(causal=causal))
        torch.testing.assert_close(y[:, :, part], alone)


def test_a_later_token_changes_no_earlier_output():
    kind, mask = WindowAttention(window=9, n_global=120, backend="auto"), AttentionMask(causal=True)
    before = kind(*(x.clone() for x in qkv(S)), mask)
    changed = qkv(S)
    for x in changed:
        x[:, :, 100:] += 3.0
    after = kind(*changed, mask)
    assert torch.equal(before[:, :, :100], after[:, :, :100])
    assert not torch.equal(before[:, :, 100:], after[:, :, 100:])


def largest(length: int, causal: bool) -> int:
    leaves = [x.requires_grad_() for x in qkv(length, B=1, dtype=torch.float32)]
    kind = WindowAttention(window=16, n_global=2, backend="sdpa")
    with LargestTensor() as seen:
        kind(*leaves, AttentionMask(causal=causal)).sum().backward()
    return seen.numel


@pytest.mark.parametrize("causal", [False, True])
def test_memory_is_linear_in_the_length(causal: bool):
    assert largest(4096, causal) <= 2.01 * largest(2048, causal)
    assert largest(4096, causal) < 4096 * 4096 / 8


def test_a_window_that_the_mask_repeats_is_no_contradiction():
    q, k, v = qkv(S)
    kind = WindowAttention(window=9, n_global=0, backend="auto")
    assert torch.equal(kind(q, k, v, AttentionMask(window=9)), kind(q, k, v, AttentionMask()))


@pytest.mark.parametrize(
    ("mask", "options", "names"),
    [
        (AttentionMask(window=8), {}, "model.window=null"),
        (AttentionMask(prefix=2), {}, "model.attention_kind=full"),
        (AttentionMask(order=torch.arange(S)[None]), {}, "model.attention_kind=full"),
        (AttentionMask(), {"bias": torch.zeros(S, S)}, "model.position=rotary"),
        (AttentionMask(), {"alibi": torch.ones(4)}, "model.position=rotary"),
    ],
)
def test_what_it_cannot_do_is_an_error_that_names_the_fix(mask: AttentionMask, options: dict, names: str):
    with pytest.raises(ConfigError, match=f"model.attention_kind=window .*set {names}"):
        WindowAttention(window=9, n_global=0, backend="auto")(*qkv(S), mask, ScoreOptions(**options))


def test_a_softcap_and_dropout_reach_the_backend():
    q, k, v = qkv(S)
    kind, mask = WindowAttention(window=9, n_global=2, backend="auto"), AttentionMask(causal=True)
    assert not torch.allclose(kind(q, k, v, mask, ScoreOptions(softcap=0.5)), kind(q, k, v, mask))
    assert not torch.allclose(kind(q, k, v, mask, ScoreOptions(dropout_p=0.5)), kind(q, k, v, mask))
