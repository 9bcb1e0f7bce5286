import pytest
import torch
from torch import Tensor

from genai_pl.kernels import AttentionMask, ScoreOptions
from genai_pl.kernels.dense import dense_attention
from genai_pl.kernels.reference import reference_attention
from genai_pl.kernels.sdpa import sdpa_attention

B, H, D = 2, 4, 40
SIZES = [(1, 1), (17, 17), (129, 129), (1, 17), (17, 129), (17, 5)]
FEATURES = ["nothing", "causal", "window", "causal window", "segments", "causal segments", "order", "prefix"]


def make_mask(features: str, T: int, S: int) -> AttentionMask:
    generator = torch.Generator().manual_seed(S)

    def draw(high: int, length: int) -> Tensor:
        return torch.randint(high, (B, length), generator=generator)

    fields: dict = {"causal": "causal" in features}
    if "window" in features:
        fields["window"] = 4
    if "segments" in features:
        fields |= {"segments": draw(3, S), "query_segments": draw(3, T)}
    if "order" in features:
        fields |= {"order": draw(S, S), "strict": True}
    if "prefix" in features:
        fields |= {"causal": True, "prefix": torch.tensor([0, 3])}
    return AttentionMask(**fields)


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, **options) -> Tensor:
    return sdpa_attention(q, k, v, mask, ScoreOptions(**options))


def dense(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, **options) -> Tensor:
    return dense_attention(q, k, v, mask, ScoreOptions(**options))


def inputs(T: int, S: int, *, K: int = 2, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q, k, v and the gradient of the output."""
    generator = torch.Generator().manual_seed(T + S)
    shapes = [(B, H, T, D), (B, K, S, D), (B, K, S, D), (B, H, T, D)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def run(attention, tensors: list[Tensor], mask: AttentionMask, **options) -> list[Tensor]:
    """The output and the gradients of q, k, v and of bias and sinks if there are any."""
    *qkv, d_out = tensors
    leaves = [x.detach().clone().requires_grad_() for x in qkv]
    for name in {"bias", "sinks"} & set(options):
        options[name] = options[name].detach().clone().requires_grad_()
        leaves.append(options[name])
    out = attention(*leaves[:3], mask, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, d_out.to(out.dtype))]


@pytest.mark.parametrize("attention", [sdpa, dense])
@pytest.mark.parametrize(
    ("features", "T", "S"),
    # where there are more queries than keys, some have no rank of their own
    [(features, T, S) for features in FEATURES for T, S in SIZES if features != "order" or T <= S],
)
def test_it_equals_the_reference_forward_and_backward(attention, features: str, T: int, S: int):
    mask = make_mask(features, T, S)
    for K in (1, 2, 4):
        tensors = inputs(T, S, K=K)
        torch.testing.assert_close(run(attention, tensors, mask), run(reference_attention, tensors, mask))


@pytest.mark.parametrize("attention", [sdpa, dense])
@pytest.mark.parametrize(("T", "S"), [(17, 17), (1, 17), (5, 17)])
@pytest.mark.parametrize("features", ["nothing", "causal", "segments"])
def test_it_equals_the_reference_with_bias_alibi_and_scale(attention, features: str, T: int, S: int):
    tensors, mask = inputs(T, S), make_mask(features, T, S)
    slopes = 2.0 ** -torch.arange(1, H + 1, dtype=torch.float64)
    for shape in ((B, H, T, S), (1, H, T, S), (1, 1, 1, S), (T, S)):
        for options in ({}, {"alibi": slopes}, {"scale": 0.3}):
            options = options | {"bias": torch.randn(shape, dtype=torch.float64)}
            ours, expected = (run(f, tensors, mask, **options) for f in (attention, reference_attention))
            torch.testing.assert_close(ours, expected)
    options = {"alibi": slopes}
    ours, expected = (run(f, tensors, mask, **options) for f in (attention, reference_attention))
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("attention", [sdpa, dense])
@pytest.mark.parametrize(
    ("features", "T", "S"),
    [(features, T, S) for features in FEATURES for T, S in SIZES if features != "order" or T <= S],
)
def test_it_equals_the_reference_with_sinks(attention, features: str, T: int, S: int):
    mask = make_mask(features, T, S)
    sinks = torch.tensor([0.5, -3.0, 4.0, 0.0], dtype=torch.float64)
    slopes = 2.0 ** -torch.arange(1, H + 1, dtype=torch.float64)
    bias = torch.randn(1, 1, 1, S, dtype=torch.float64)
    for K, options in ((1, {}), (2, {"scale": 0.3}), (4, {"alibi": slopes}), (2, {"bias": bias})):
        tensors, options = inputs(T, S, K=K), {"sinks": sinks} | options
        torch.testing.assert_close(
            run(attention, tensors, mask, **options), run(reference_attention, tensors, mask, **options)
        )


@pytest.mark.parametrize("attention", [sdpa, dense, reference_attention])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [False, True])
def test_a_query_that_sees_nothing_gets_zeros_and_gives_zero_gradient(attention, dtype, biased: bool):
    T = S = 33
    segments = torch.ones(B, S, dtype=torch.long)
    segments[0, 5:9] = 0
    segments[1] = 0  # a row of nothing but padding
    options = {"bias": torch.zeros(1, H, T, S, dtype=dtype), "sinks": torch.zeros(H, dtype=dtype)} if biased else {}
    mask = AttentionMask(causal=True, segments=segments)
    with torch.autograd.set_detect_anomaly(True):  # no NaN on the way either
        results = run(attention, inputs(T, S, dtype=dtype), mask, **options)
    assert all(x.isfinite().all() for x in results)
    out, d_q, d_k, d_v, *_ = results
    padding = (segments == 0)[:, None, :, None]
    for x in (out, d_q, d_k, d_v):
        assert not x.masked_select(padding).any()
        assert x.masked_select(~padding).any()


@pytest.mark.parametrize("attention", [sdpa, dense, reference_attention])
@pytest.mark.parametrize("features", ["nothing", "causal", "causal segments", "sinks"])
def test_bf16_errs_at_most_twice_as_much_as_eager_bf16(attention, features: str):
    T = S = 129
    mask = make_mask(features, T, S)
    tensors = inputs(T, S, K=H)
    options = {"sinks": torch.tensor([0.5, -3.0, 4.0, 1.0], dtype=torch.float64)} if features == "sinks" else {}

    def eager(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, *, sinks: Tensor | None = None) -> Tensor:
        scores = (q @ k.transpose(-2, -1)) * D**-0.5
        dense = mask.dense(T, S)
        scores = scores.masked_fill(~dense, -1e9)
        if sinks is not None:
            scores = torch.cat([scores, sinks[:, None, None].expand(B, H, T, 1)], dim=-1)
        return (scores.softmax(-1)[..., :S] * dense) @ v

    exact = run(reference_attention, tensors, mask, **options)
    low, low_options = [x.bfloat16() for x in tensors], {name: x.bfloat16() for name, x in options.items()}
    results = run(attention, low, mask, **low_options), run(eager, low, mask, **low_options)
    for ours, theirs, truth in zip(*results, exact, strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours - truth).abs().max() <= 2 * (theirs - truth).abs().max()


@pytest.mark.parametrize(
    ("mask", "T", "S"),
    [
        (AttentionMask(), 5, 7),
        (AttentionMask(causal=True), 5, 5),
        (AttentionMask(causal=True), 1, 7),
        (AttentionMask(causal=True, window=7), 5, 5),
    ],
)
def test_sdpa_builds_no_mask_where_none_is_needed(monkeypatch, mask: AttentionMask, T: int, S: int):
    monkeypatch.setattr(AttentionMask, "_build_dense", lambda *_: pytest.fail("a (T, S) mask was built"))
    q, k, v, _ = inputs(T, S)
    assert sdpa(q, k, v, mask).shape == q.shape


@pytest.mark.parametrize("attention", [sdpa, dense])
@pytest.mark.parametrize("biased", [False, True])
def test_it_runs_in_autocast_with_float32_inputs(attention, biased: bool):
    tensors = inputs(17, 17, dtype=torch.float32)
    options = {"bias": torch.ones(1, H, 17, 17)} if biased else {}
    mask = AttentionMask(causal=True, window=4)
    exact = reference_attention(*tensors[:3], mask, **options)
    with torch.autocast("cpu", torch.bfloat16):
        results = run(attention, tensors, mask, **options)
    torch.testing.assert_close(results[0], exact, atol=2e-2, rtol=0, check_dtype=False)
    assert all(gradient.dtype == torch.float32 for gradient in results[1:])


@pytest.mark.parametrize("attention", [sdpa, dense, reference_attention])
def test_dropout_follows_the_seed_and_keeps_the_mean(attention):
    q, k, _, _ = inputs(129, 129, dtype=torch.float32)
    v = torch.ones_like(k)
    mask = AttentionMask(causal=True)
    with torch.random.fork_rng():
        outs = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            outs.append(attention(q, k, v, mask, dropout_p=0.25))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])
    assert abs(outs[0].mean().item() - 1) < 0.02
