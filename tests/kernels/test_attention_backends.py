import logging
import sys

import pytest
import torch
from torch import Tensor

from genai_pl.errors import ConfigError
from genai_pl.kernels import AttentionMask, ScoreOptions, attention, choose_backend
from genai_pl.kernels.dense import dense_attention
from genai_pl.kernels.reference import reference_attention
from genai_pl.kernels.sdpa import sdpa_attention

CPU = torch.device("cpu")


def inputs(*, H: int = 4, K: int = 2, T: int = 6, S: int = 6, D: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, n, D, generator=generator) for heads, n in ((H, T), (K, S), (K, S)))
    return q, k, v


def test_auto_runs_sdpa_and_says_why():
    q, k, v = inputs()
    mask = AttentionMask(causal=True)
    assert torch.equal(attention(q, k, v, mask), sdpa_attention(q, k, v, mask))
    backend, reason = choose_backend(CPU)
    assert backend == "sdpa"
    assert "cpu" in reason


@pytest.mark.parametrize("pays", [False, True])
def test_auto_takes_dense_attention_for_short_rows_of_bf16_where_its_products_are_fast(monkeypatch, pays: bool):
    monkeypatch.setattr(sys.modules["genai_pl.kernels.attention"], "bf16_products_pay", lambda: pays)
    mask = AttentionMask(causal=True)
    for T, S, dtype in [
        (64, 64, torch.bfloat16),
        (64, 64, torch.float32),
        (1, 640, torch.bfloat16),
        (64, 640, torch.bfloat16),
    ]:
        q, k, v = (x.to(dtype) for x in inputs(T=T, S=S))
        is_dense = pays and dtype is torch.bfloat16 and (T < 32 or S <= 512)
        expected = (dense_attention if is_dense else sdpa_attention)(q, k, v, mask, ScoreOptions())
        assert torch.equal(attention(q, k, v, mask), expected)


def test_auto_falls_back_to_the_reference_for_softcap_and_logs_the_reason_once(caplog):
    q, k, v = inputs()
    mask = AttentionMask()
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            out = attention(q, k, v, mask, softcap=31.5)
    assert torch.equal(out, reference_attention(q, k, v, mask, softcap=31.5))
    assert [record.message for record in caplog.records] == [
        "attention: reference, because scaled_dot_product_attention has no softcap (31.5)"
    ]
    assert choose_backend(CPU, options=ScoreOptions(softcap=31.5))[0] == "reference"


def test_a_named_backend_is_the_one_that_runs():
    q, k, v = inputs()
    mask = AttentionMask(window=2)
    assert torch.equal(attention(q, k, v, mask, backend="reference"), reference_attention(q, k, v, mask))
    assert torch.equal(attention(q, k, v, mask, backend="sdpa"), sdpa_attention(q, k, v, mask))


def test_sdpa_with_softcap_is_refused_with_the_option_and_the_fix():
    with pytest.raises(ConfigError, match=r"model\.attention=sdpa .* softcap .* set model\.attention=auto"):
        attention(*inputs(), softcap=30.0, backend="sdpa")


def test_an_unknown_backend_is_refused_with_the_list_of_backends():
    with pytest.raises(ConfigError, match=r"model\.attention=flash .* auto, triton, sdpa, varlen, dense, reference"):
        attention(*inputs(), backend="flash")


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"query heads \(4\) must be a multiple of key/value heads \(3\)"):
        attention(*inputs(K=3))


@pytest.mark.parametrize("other", [{"D": 4}, {"S": 5}])
def test_keys_and_values_that_do_not_fit_are_refused(other: dict):
    q, k, v = inputs()
    _, wrong, _ = inputs(**other)
    with pytest.raises(ValueError, match="do not fit"):
        attention(q, k, wrong) if "S" in other else attention(q, wrong, v)


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_attention_compiles_to_one_graph_with_the_same_result(documents: bool, softcap: float | None):
    q, k, v = (x.requires_grad_() for x in inputs())
    segments = torch.tensor([[1, 1, 2, 2, 2, 0]]).expand(2, 6) if documents else None

    def step(q: Tensor, k: Tensor, v: Tensor, segments: Tensor | None) -> Tensor:
        return attention(q, k, v, AttentionMask(causal=True, segments=segments), softcap=softcap)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    ours, expected = compiled(q, k, v, segments), step(q, k, v, segments)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(
        torch.autograd.grad(ours.sum(), (q, k, v)), torch.autograd.grad(expected.sum(), (q, k, v))
    )


@pytest.mark.parametrize("backend", ["sdpa", pytest.param("reference", marks=pytest.mark.slow), "triton"])
def test_one_graph_serves_every_length(backend: str):
    if backend == "triton":
        pytest.importorskip("triton", reason="the kernels need triton")

    def step(q: Tensor, k: Tensor, v: Tensor, segments: Tensor) -> Tensor:
        return attention(q, k, v, AttentionMask(causal=True, segments=segments), backend=backend)

    torch.compiler.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)
    for T in (6, 9):
        tensors = (*inputs(T=T, S=T), torch.arange(T).expand(2, T) // 4)
        with torch.compiler.set_stance("default" if T == 6 else "fail_on_recompile"):
            torch.testing.assert_close(compiled(*tensors), step(*tensors))
