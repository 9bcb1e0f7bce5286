"""Performer against its lemma, its convergence, and sums over its features written out densely."""

import math
from itertools import pairwise

import pytest
import torch
from dense_attention import attend, average, draw, gradients, packed, qkv, shown
from largest_tensor import LargestTensor
from torch import Tensor

from genai_pl.errors import ConfigError
from genai_pl.kernels import AttentionMask, ScoreOptions
from genai_pl.kernels.efficient import Performer
from genai_pl.kernels.efficient.performer import log_features, orthogonal_features

S = 300  # two blocks and a part
PACKED = torch.cat([packed(120, 100, padding=80), packed(60, 1, 200, 39)])
LEFT_PADDED = torch.cat([torch.zeros(2, 150, dtype=torch.long), packed(100, 50).expand(2, -1)], 1)
GAP = torch.where(torch.arange(S).expand(2, -1) // 40 == 3, 0, 1)  # a document that padding interrupts


def exact(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, features: Tensor, scale: float) -> Tensor:
    """The weights of eq. 5 and Lemma 1 as a whole matrix in float64, without any care for their size."""
    q, k, features = (x.double() for x in (q, k.repeat_interleave(q.shape[1] // k.shape[1], 1), features))
    phi_q, phi_k = (
        torch.exp(x * scale**0.5 @ features.t() - scale * x.square().sum(-1, keepdim=True) / 2) for x in (q, k)
    )
    return average(phi_q @ phi_k.transpose(-2, -1) * visible, v.double())


def estimates(x: Tensor, y: Tensor, n_draws: int) -> Tensor:
    """Estimates of exp(x . y) with 12 features each, (n_draws, n)."""
    generator = torch.Generator().manual_seed(0)
    draws = [orthogonal_features(12, x.shape[-1], generator).double() for _ in range(n_draws)]
    return torch.stack([torch.exp(log_features(x, f) + log_features(y, f)).mean(-1) for f in draws])


def test_the_kernel_is_estimated_without_bias():
    x, y = 0.25 * draw(6, 8, seed=1), 0.25 * draw(6, 8, seed=2)
    x[0] = y[0] = 0.5 * torch.eye(8, dtype=torch.float64)[0]  # where a factorization with fixed signs would err
    x[1] = y[1]
    results = estimates(x, y, 4000)
    standard_error = results.std(0) / math.sqrt(len(results))
    assert ((results.mean(0) - torch.exp((x * y).sum(-1))).abs() <= 4 * standard_error).all()


def test_features_are_orthogonal_in_blocks_and_normal_in_every_direction():
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([orthogonal_features(12, 8, generator) for _ in range(4000)]).double()  # (4000, 12, 8)
    products = draws @ draws.transpose(-2, -1)
    assert (products[:, :8, :8] - torch.diag_embed(products[:, :8, :8].diagonal(dim1=1, dim2=2))).abs().max() < 1e-4
    assert products[:, :8, 8:].abs().max() > 1  # blocks know nothing of each other
    # entries have mean 0 and variance 1 (itself with variance 2), up to 5 standard errors
    assert draws.mean(0).abs().max() < 5 / math.sqrt(4000)
    assert (draws.square().mean(0) - 1).abs().max() < 5 * math.sqrt(2 / 4000)


def test_the_error_of_attention_falls_like_one_over_the_root_of_the_number_of_features():
    q, k, v = (x * size for x, size in zip(qkv(64), (0.3, 0.3, 1), strict=True))
    full = attend(q, k, v, shown(64, 64, causal=True))

    def error(n_features: int) -> float:
        kinds = [Performer(head_dim=8, n_features=n_features, seed=seed) for seed in range(24)]
        squares = [(kind(q, k, v, AttentionMask(causal=True)) - full).square().mean() for kind in kinds]
        return torch.stack(squares).mean().sqrt().item()

    errors = [error(n) for n in (32, 128, 512, 2048)]
    assert all(1.7 < a / b < 2.3 for a, b in pairwise(errors)), errors
    assert errors[-1] < 0.05 * full.square().mean().sqrt().item()


@pytest.mark.parametrize("T", [S, 140, 1])
@pytest.mark.parametrize("segments", [None, PACKED, LEFT_PADDED, GAP], ids=["", "packed", "left_padded", "gap"])
@pytest.mark.parametrize("causal", [False, True])
def test_blocks_and_states_are_the_whole_matrix(causal: bool, segments: Tensor | None, T: int):
    q, k, v = qkv(T, S, dtype=torch.float32)
    kind = Performer(head_dim=8, n_features=40, seed=0)
    y = kind(q, k, v, AttentionMask(causal=causal, segments=segments), ScoreOptions(scale=0.5))
    expected = exact(q, k, v, shown(T, S, causal=causal, segments=segments), kind.features, 0.5)
    torch.testing.assert_close(y.double(), expected, atol=5e-6, rtol=1e-5)


def test_more_queries_than_keys_of_the_same_documents():
    q, k, v = qkv(S, 40, dtype=torch.float32)
    kind, ids = Performer(head_dim=8, n_features=40, seed=0), packed(30, padding=10).expand(2, -1)
    queries = packed(200, padding=100).expand(2, -1)
    y = kind(q, k, v, AttentionMask(segments=ids, query_segments=queries))
    visible = (queries[:, None, :, None] == ids[:, None, None]) & (ids != 0)[:, None, None]
    expected = exact(q, k, v, visible, kind.features, 8**-0.5)
    torch.testing.assert_close(y.double(), expected, atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("segments", [None, PACKED], ids=["", "packed"])
@pytest.mark.parametrize("causal", [False, True])
def test_gradients_are_those_of_the_whole_matrix(causal: bool, segments: Tensor | None):
    leaves = [x.requires_grad_() for x in qkv(S)]
    kind = Performer(head_dim=8, n_features=40, seed=0)
    visible = shown(S, S, causal=causal, segments=segments)
    ours = gradients(kind(*leaves, AttentionMask(causal=causal, segments=segments)), leaves)
    torch.testing.assert_close(ours, gradients(exact(*leaves, visible, kind.features, 8**-0.5), leaves))


@pytest.mark.parametrize("causal", [False, True])
def test_packed_documents_are_alone(causal: bool):
    q, k, v = qkv(S, dtype=torch.float32)
    kind = Performer(head_dim=8, n_features=40, seed=0)
    y = kind(q, k, v, AttentionMask(causal=causal, segments=packed(130, 150, padding=20).expand(2, -1)))
    for part in (slice(0, 130), slice(130, 280)):
        alone = kind(*(x[:, :, part] for x in (q, k, v)), AttentionMask(causal=causal))
        torch.testing.assert_close(y[:, :, part], alone, atol=5e-6, rtol=1e-5)
    assert not y[:, :, 280:].any()


@pytest.mark.parametrize("size", [1.0, 40.0])
def test_a_later_token_changes_no_earlier_output_however_large(size: float):
    kind, mask = Performer(head_dim=8, n_features=40, seed=0), AttentionMask(causal=True)
    before = kind(*qkv(S, dtype=torch.float32), mask)
    changed = qkv(S, dtype=torch.float32)
    for x in changed:
        x[:, :, 200:] = size * x[:, :, 200:] + 1
    after = kind(*changed, mask)
    assert torch.equal(before[:, :, :200], after[:, :, :200])
    assert after.isfinite().all()


def test_keys_of_any_length_neither_overflow_nor_vanish():
    q, k, v = qkv(S, dtype=torch.float32)
    k[:, :, 0] *= 50  # alone with it, the first query must see its value
    y = Performer(head_dim=8, n_features=40, seed=0)(q, k, v, AttentionMask(causal=True))
    torch.testing.assert_close(y[:, :, 0], v[:, :, 0].repeat_interleave(2, 1))
    assert y.isfinite().all()


def test_rows_that_see_nothing_give_zeros_and_zero_gradients():
    leaves = [x.requires_grad_() for x in qkv(S, dtype=torch.float32)]
    kind = Performer(head_dim=8, n_features=40, seed=0)
    with torch.autograd.set_detect_anomaly(True):  # no NaN on the way either
        y = kind(*leaves, AttentionMask(causal=True, segments=torch.zeros(2, S, dtype=torch.long)))
        assert not y.any()
        assert not any(x.any() for x in torch.autograd.grad(y.sum(), leaves))


def test_bf16_is_the_float32_result_rounded_once():
    rounded = [x.bfloat16() for x in qkv(S)]
    kind, mask = Performer(head_dim=8, n_features=40, seed=0), AttentionMask(causal=True)
    exact = kind(*(x.float() for x in rounded), mask)
    assert torch.equal(kind(*rounded, mask), exact.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(kind(*rounded, mask), exact.bfloat16())


def test_features_are_kept_in_the_checkpoint_and_redrawn_from_a_generator():
    kind, other = (Performer(head_dim=8, n_features=40, seed=seed) for seed in (0, 1))
    assert not torch.equal(kind.features, other.features)
    other.load_state_dict(kind.state_dict())
    assert torch.equal(kind.features, other.features)
    kind.redraw(torch.Generator().manual_seed(1))
    assert torch.equal(kind.features, Performer(head_dim=8, n_features=40, seed=1).features)


def largest(length: int, causal: bool) -> int:
    leaves = [x.requires_grad_() for x in qkv(length, B=1, dtype=torch.float32)]
    kind = Performer(head_dim=8, n_features=16, seed=0)
    with LargestTensor() as seen:
        kind(*leaves, AttentionMask(causal=causal)).sum().backward()
    return seen.numel


@pytest.mark.parametrize("causal", [False, True])
def test_memory_is_linear_in_the_length(causal: bool):
    assert largest(4096, causal) <= 2 * largest(2048, causal)
    assert largest(4096, causal) < 4096 * 4096 / 4


@pytest.mark.parametrize(
    ("mask", "options", "fix"),
    [
        (AttentionMask(window=3), {}, "model.window=null"),
        (AttentionMask(prefix=2), {}, "model.attention_kind=full"),
        (AttentionMask(), {"bias": torch.zeros(24, 24)}, "model.position=rotary"),
        (AttentionMask(), {"alibi": torch.ones(4)}, "model.position=rotary"),
        (AttentionMask(), {"softcap": 5.0}, "model.softcap=null"),
        (AttentionMask(), {"dropout_p": 0.1}, "model.dropout=0"),
    ],
)
def test_what_it_cannot_do_is_an_error_that_names_the_fix(mask: AttentionMask, options: dict, fix: str):
    with pytest.raises(ConfigError, match=f"model.attention_kind=performer .*set {fix}"):
        Performer(head_dim=8, n_features=16, seed=0)(*qkv(24), mask, ScoreOptions(**options))
