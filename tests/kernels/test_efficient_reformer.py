"""LSH attention: full with one bucket, published collision probabilities, and no leak between positions."""

import math

import pytest
import torch
from dense_attention import draw, gradients, packed, qkv, shown
from largest_tensor import LargestTensor
from torch import Tensor

from genai_pl.errors import ConfigError
from genai_pl.kernels import AttentionMask, ScoreOptions
from genai_pl.kernels.efficient import Reformer
from genai_pl.kernels.efficient.reformer import lsh_buckets

S = 100
PACKED = torch.cat([packed(40, 30, padding=30), packed(1, 60, 39)])


def reformer(bucket_size: int, n_hashes: int = 2, seed: int = 0) -> Reformer:
    return Reformer(n_hashes=n_hashes, bucket_size=bucket_size, seed=seed)


def shared(q: Tensor, v: Tensor, visible: Tensor, scale: float) -> Tensor:
    """softmax(scale q q' / |q'|) v without the diagonal, except in rows where there is nothing else."""
    itself = torch.eye(q.shape[2], dtype=torch.bool)
    others = visible & ~itself
    allowed = others | (visible & itself & ~others.any(-1, keepdim=True))
    scores = scale * q @ (q / q.norm(dim=-1, keepdim=True)).transpose(-2, -1)
    weights = torch.softmax(scores.masked_fill(~allowed, -1e9), dim=-1) * allowed
    return weights @ v.repeat_interleave(q.shape[1] // v.shape[1], 1)


@pytest.mark.parametrize("bucket_size", [S, 3 * S])
@pytest.mark.parametrize("segments", [None, PACKED], ids=["", "packed"])
@pytest.mark.parametrize("causal", [False, True])
def test_one_bucket_is_full_attention_with_shared_queries_and_keys(causal, segments: Tensor | None, bucket_size: int):
    q, _, v = (x.requires_grad_() for x in qkv(S))
    y = reformer(bucket_size)(q, None, v, AttentionMask(causal=causal, segments=segments), ScoreOptions(scale=0.8))
    expected = shared(q, v, shown(S, S, causal=causal, segments=segments), 0.8)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(gradients(y, [q, v]), gradients(expected, [q, v]))


def test_two_buckets_tell_vectors_apart_with_probability_angle_over_pi():
    angles = torch.tensor([0.0, 0.3, 1.0, math.pi / 2, 2.5, math.pi], dtype=torch.float64)
    q = torch.zeros(1, 1, 6, 8, dtype=torch.float64)
    q[..., 0], q[..., 1] = angles.cos(), angles.sin()
    buckets = lsh_buckets(5 * q, n_hashes=20000, n_half=1, seed=0)[0, 0].double()  # (R, 6)
    apart = (buckets != buckets[:, :1]).double().mean(0)
    expected = angles / math.pi  # of the sign of a random projection (Charikar 2002)
    assert ((apart - expected).abs() <= 4 * (expected * (1 - expected) / 20000).sqrt() + 1e-9).all()


def test_buckets_are_directions_whatever_the_length_and_their_opposites():
    q = draw(1, 2, 50, 8)
    buckets, longer, opposite = (lsh_buckets(x, n_hashes=3, n_half=4, seed=0) for x in (q, 7 * q, -q))
    assert buckets.shape == (1, 2, 3, 50)
    assert torch.equal(buckets, longer)
    assert torch.equal((buckets + 4) % 8, opposite)
    assert set(buckets.unique().tolist()) == set(range(8))


def clusters(n: int = 256) -> tuple[Tensor, Tensor]:
    """Queries around 16 directions, so sharp that each attends within its cluster, and values, (1, 2, n, ...)."""
    centres = draw(1, 2, 16, 32, seed=1)[:, :, torch.arange(n) % 16]
    return 3 * (centres + 0.1 * draw(1, 2, n, 32, seed=2)), draw(1, 2, n, 8, seed=3)


@pytest.mark.parametrize("causal", [False, True])
def test_more_rounds_of_hashing_come_closer_to_full_attention(causal: bool):
    q, v = clusters()
    full = shared(q, v, shown(256, 256, causal=causal), 1.0)

    def error(n_hashes: int) -> float:
        kinds = [reformer(32, n_hashes, seed) for seed in range(4)]
        squares = [
            (kind(q, None, v, AttentionMask(causal=causal), ScoreOptions(scale=1.0)) - full).square().mean()
            for kind in kinds
        ]
        return (torch.stack(squares).mean() / full.square().mean()).sqrt().item()

    errors = [error(n) for n in (1, 4, 16)]
    assert errors[0] > 1.5 * errors[1] > 2 * errors[2], errors


def test_a_later_token_changes_no_earlier_output_nor_who_is_seen():
    kind, mask = reformer(8), AttentionMask(causal=True)
    q, _, v = qkv(S)
    before = kind(q, None, v, mask)
    q[:, :, 60:], v[:, :, 60:] = 2.0 - q[:, :, 60:], 5.0
    after = kind(q, None, v, mask)
    torch.testing.assert_close(before[:, :, :60], after[:, :, :60], atol=1e-12, rtol=0)
    assert not torch.allclose(before[:, :, 60:], after[:, :, 60:])


@pytest.mark.parametrize("causal", [False, True])
def test_a_document_knows_nothing_of_the_others_of_its_row(causal: bool):
    kind, mask = reformer(8), AttentionMask(causal=causal, segments=packed(40, 50, padding=10).expand(2, -1))
    q, _, v = qkv(S)
    before = kind(q, None, v, mask)
    for x in (q, v):
        x[:, :, :40], x[:, :, 90:] = 2.0 - x[:, :, :40], 5.0
    after = kind(q, None, v, mask)
    torch.testing.assert_close(before[:, :, 40:90], after[:, :, 40:90], atol=1e-12, rtol=0)
    assert not after[:, :, 90:].any()


@pytest.mark.parametrize("causal", [False, True])
def test_packed_documents_in_one_bucket_are_alone(causal: bool):
    q, _, v = qkv(S)
    y = reformer(S)(q, None, v, AttentionMask(causal=causal, segments=packed(40, 60).expand(2, -1)))
    for part in (slice(0, 40), slice(40, S)):
        alone = reformer(S)(q[:, :, part], None, v[:, :, part], AttentionMask(causal=causal))
        torch.testing.assert_close(y[:, :, part], alone)


def test_a_position_alone_in_its_document_sees_itself():
    q, _, v = qkv(S)
    y = reformer(8)(q, None, v, AttentionMask(segments=torch.arange(1, S + 1).expand(2, -1)))
    torch.testing.assert_close(y, v.repeat_interleave(2, 1))


@pytest.mark.parametrize("segments", [None, PACKED], ids=["", "packed"])
@pytest.mark.parametrize("T", [1, 30])
def test_fewer_queries_than_cached_ones_are_exact(T: int, segments: Tensor | None):
    q, _, v = qkv(S, H=2)
    mask = AttentionMask(causal=True, segments=segments)
    expected = shared(q, v, shown(S, S, causal=True, segments=segments), 8**-0.5)[:, :, -T:]
    torch.testing.assert_close(reformer(8)(q[:, :, -T:], q, v, mask), expected)
    one_bucket = reformer(S)(q, q, v, mask)[:, :, -T:]
    torch.testing.assert_close(one_bucket, expected)


def test_the_seed_decides_the_buckets_and_keys_are_not_read():
    q, k, v = qkv(S)
    mask = AttentionMask(causal=True)
    y = reformer(8)(q, None, v, mask)
    assert torch.equal(y, reformer(8)(q, 100 * k, v, mask))
    assert not torch.allclose(y, reformer(8, seed=1)(q, None, v, mask))


def test_gradients_flow_through_many_buckets_to_finite_numbers():
    q, _, v = (x.requires_grad_() for x in qkv(S, dtype=torch.float32))
    with torch.autograd.set_detect_anomaly(True):  # no NaN on the way either
        y = reformer(8)(q, None, v, AttentionMask(causal=True, segments=PACKED))
        d_q, d_v = torch.autograd.grad(y.square().sum(), [q, v])
    assert (d_q[:, :, 5:40].abs().sum(-1) > 0).all(dim=(0, 1)).any()
    assert d_q.isfinite().all()
    assert d_v[PACKED[:, None].expand(-1, 2, -1) == 0].abs().sum() == 0


def test_bf16_errs_at_most_twice_as_much_as_bf16_attention():
    q, _, v = (x.bfloat16() for x in qkv(64, K=4))
    visible = shown(64, 64, causal=True)
    exact, eager = shared(q.double(), v.double(), visible, 8**-0.5), shared(q, v, visible, 8**-0.5)
    ours = reformer(64)(q, None, v, AttentionMask(causal=True))
    assert ours.dtype == torch.bfloat16
    assert (ours - exact).abs().max() <= 2 * (eager - exact).abs().max()


def largest(length: int, causal: bool) -> int:
    q, _, v = (x.requires_grad_() for x in qkv(length, B=1, dtype=torch.float32))
    with LargestTensor() as seen:
        reformer(64)(q, None, v, AttentionMask(causal=causal)).sum().backward()
    return seen.numel


@pytest.mark.parametrize("causal", [False, True])
def test_memory_is_linear_in_the_length(causal: bool):
    assert largest(4096, causal) <= 2 * largest(2048, causal)
    assert largest(4096, causal) < 4 * 4096 * 4096 / 8


@pytest.mark.parametrize(
    ("mask", "options", "fix"),
    [
        (AttentionMask(window=3), {}, "model.window=null"),
        (AttentionMask(prefix=2), {}, "model.attention_kind=full"),
        (AttentionMask(segments=PACKED, query_segments=PACKED), {}, "model.attention_kind=full"),
        (AttentionMask(), {"bias": torch.zeros(S, S)}, "model.position=rotary"),
        (AttentionMask(), {"alibi": torch.ones(4)}, "model.position=rotary"),
        (AttentionMask(), {"softcap": 5.0}, "model.softcap=null"),
    ],
)
def test_what_it_cannot_do_is_an_error_that_names_the_fix(mask: AttentionMask, options: dict, fix: str):
    q, _, v = qkv(S)
    with pytest.raises(ConfigError, match=f"model.attention_kind=reformer .*set {fix}"):
        reformer(8)(q, None, v, mask, ScoreOptions(**options))


def test_dropout_drops():
    q, _, v = qkv(S)
    mask = AttentionMask(causal=True)
    with torch.random.fork_rng():
        assert not torch.allclose(
            reformer(8)(q, None, v, mask, ScoreOptions(dropout_p=0.5)), reformer(8)(q, None, v, mask)
        )
