"""Linformer against its equation, and in the limit where it is full attention."""

import pytest
import torch
from dense_attention import attend, packed, qkv, shown
from largest_tensor import LargestTensor

from genai_pl.errors import ConfigError
from genai_pl.kernels import AttentionMask, ScoreOptions
from genai_pl.kernels.efficient import Linformer

BOTH = AttentionMask()


def linformer(S: int, rank: int, K: int = 2) -> Linformer:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Linformer(max_seq_len=S, rank=rank, n_kv_head=K).double()


def test_projections_of_the_identity_give_full_attention():
    kind = linformer(24, rank=24)
    with torch.no_grad():
        for parameter in kind.parameters():
            parameter.copy_(torch.eye(24).expand(2, -1, -1))
    q, k, v = qkv(24)
    torch.testing.assert_close(kind(q, k, v, BOTH), attend(q, k, v, shown(24, 24, causal=False)))


@pytest.mark.parametrize("S", [24, 17])
def test_it_is_equation_7_with_the_first_columns_of_the_projections(S: int):
    kind = linformer(24, rank=5, K=4)
    q, k, v = qkv(S, K=4)
    y = kind(q, k, v, BOTH, ScoreOptions(scale=0.6))
    for h in range(4):
        E, F = kind.key_projection[h, :, :S], kind.value_projection[h, :, :S]
        weights = torch.softmax(0.6 * torch.einsum("btd,rs,bsd->btr", q[:, h], E, k[:, h]), dim=-1)
        torch.testing.assert_close(y[:, h], torch.einsum("btr,rs,bsd->btd", weights, F, v[:, h]))


def test_padding_is_as_if_it_were_not_there_and_gives_zeros():
    kind, segments = linformer(24, rank=5), packed(17, padding=7).expand(2, -1)
    q, k, v = qkv(24)
    y = kind(q, k, v, AttentionMask(segments=segments))
    torch.testing.assert_close(y[:, :, :17], kind(*(x[:, :, :17] for x in (q, k, v)), BOTH))
    assert not y[:, :, 17:].any()


def test_a_row_of_nothing_but_padding_gives_zeros_and_zero_gradients():
    kind = linformer(24, rank=5)
    leaves = [x.requires_grad_() for x in qkv(24, B=1)]
    y = kind(*leaves, AttentionMask(segments=torch.zeros(1, 24, dtype=torch.long)))
    assert not y.any()
    assert not any(x.any() for x in torch.autograd.grad(y.sum(), leaves))


def test_fewer_queries_are_the_last_rows():
    kind = linformer(24, rank=5)
    q, k, v = qkv(24)
    mask = AttentionMask(segments=packed(20, padding=4).expand(2, -1))
    torch.testing.assert_close(kind(q[:, :, -7:], k, v, mask), kind(q, k, v, mask)[:, :, -7:])


def test_projections_keep_lengths_on_average_and_are_learned():
    kind = linformer(512, rank=64, K=2)
    assert {name: tuple(x.shape) for name, x in kind.named_parameters()} == {
        "key_projection": (2, 64, 512),
        "value_projection": (2, 64, 512),
    }
    # a projected unit vector has the mean square length 1, with the variance 2 / 64
    lengths = kind.key_projection.square().sum(1).flatten()  # (2 * 512,)
    assert abs(lengths.mean().item() - 1) < 4 * (2 / 64 / 1024) ** 0.5
    kind(*qkv(512), BOTH).square().sum().backward()
    assert all(x.grad.abs().sum() > 0 for x in kind.parameters())


def test_bf16_errs_at_most_twice_as_much_as_bf16_attention_of_the_same_projections():
    kind = linformer(64, rank=16)
    rounded = [x.bfloat16() for x in qkv(64)]
    for x in kind.parameters():
        x.data = x.bfloat16().double()
    exact = kind(*(x.double() for x in rounded), BOTH)
    q, k, v = rounded
    E, F = kind.key_projection.bfloat16(), kind.value_projection.bfloat16()
    keys, values = ((p @ x).repeat_interleave(2, 1) for p, x in ((E, k), (F, v)))
    eager = torch.softmax(q @ keys.transpose(-2, -1) * 8**-0.5, dim=-1) @ values
    ours = kind.bfloat16()(q, k, v, BOTH)
    assert ours.dtype == torch.bfloat16
    assert (ours - exact).abs().max() <= 2 * (eager - exact).abs().max()


def largest(S: int) -> int:
    leaves = [x.requires_grad_() for x in qkv(S, B=1, dtype=torch.float32)]
    kind = Linformer(max_seq_len=S, rank=16, n_kv_head=2)
    with LargestTensor() as seen:
        kind(*leaves, AttentionMask(segments=torch.ones(1, S, dtype=torch.long))).sum().backward()
    return seen.numel


def test_memory_is_linear_in_the_length():
    assert largest(4096) <= 2 * largest(2048)
    assert largest(4096) < 4096 * 4096 / 8


@pytest.mark.parametrize(
    ("mask", "options", "message"),
    [
        (AttentionMask(causal=True), {}, "model.attention_kind=linformer .*needs model.shape=encoder"),
        (AttentionMask(segments=packed(10, 14)), {}, "linformer .*set data.separate_documents=false"),
        (AttentionMask(window=3), {}, "linformer .*set model.window=null"),
        (BOTH, {"bias": torch.zeros(24, 24)}, "linformer .*set model.position=rotary"),
        (BOTH, {"alibi": torch.ones(4)}, "linformer .*set model.position=rotary"),
    ],
)
def test_what_it_cannot_do_is_an_error_that_names_the_fix(mask: AttentionMask, options: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        linformer(24, rank=5)(*qkv(24, B=1), mask, ScoreOptions(**options))


def test_a_row_longer_than_the_projections_names_the_option():
    with pytest.raises(ConfigError, match=r"24 tokens .*20 .*model.max_seq_len"):
        linformer(20, rank=5)(*qkv(24), BOTH)
