import pytest
import torch
from brute_force import attend

from genai_pl.kernels import AttentionMask
from genai_pl.kernels.reference import reference_attention

SEGMENTS = torch.tensor([[1, 1, 2, 2, 0], [1, 0, 0, 3, 3]])
MASKS = [AttentionMask(causal=True), AttentionMask(segments=SEGMENTS), AttentionMask(causal=True, window=2, prefix=1)]


def inputs(*, H: int = 4, K: int = 2, T: int = 3, S: int = 5, D: int = 3, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, H, T, D), (2, K, S, D), (2, K, S, D)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("K", [1, 2, 4])
@pytest.mark.parametrize(
    "options",
    [
        {"scale": 0.7},
        {"scale": 1.0, "softcap": 0.5},
        {"scale": 1.0, "bias": torch.linspace(-1, 1, 4 * 3 * 5, dtype=torch.float64).view(1, 4, 3, 5)},
        {"scale": 1.0, "alibi": torch.tensor([0.5, 0.25, 0.125, 1.0], dtype=torch.float64)},
        {"scale": 0.7, "sinks": torch.tensor([0.5, -3.0, 4.0, 0.0], dtype=torch.float64)},
        {"scale": 2.0, "softcap": 1.5, "bias": torch.tensor([0.0, 3, 0, -2, 1]), "alibi": torch.ones(4)},
    ],
)
def test_the_reference_is_the_definition_in_loops(mask: AttentionMask, K: int, options: dict):
    q, k, v = inputs(K=K)
    torch.testing.assert_close(reference_attention(q, k, v, mask, **options), attend(q, k, v, mask, **options))


def test_the_scale_is_one_over_the_root_of_head_dim_unless_given():
    q, k, v = inputs(D=4)
    mask = AttentionMask()
    assert torch.equal(reference_attention(q, k, v, mask), reference_attention(q, k, v, mask, scale=0.5))


@pytest.mark.parametrize("mask", MASKS)
def test_gradients_match_finite_differences_in_blind_rows_too(mask: AttentionMask):
    tensors = [x.requires_grad_() for x in inputs()]
    bias = torch.randn(1, 1, 3, 5, dtype=torch.float64).requires_grad_()
    sinks = torch.randn(4, dtype=torch.float64).requires_grad_()

    def function(q, k, v, bias, sinks=None):
        return reference_attention(q, k, v, mask, bias=bias, sinks=sinks, softcap=2.0)

    assert torch.autograd.gradcheck(function, (*tensors, bias))
    assert torch.autograd.gradcheck(function, (*tensors, bias, sinks))


@pytest.mark.parametrize("window", [None, 2])
@torch.no_grad()
def test_sinks_are_those_of_gpt_oss(window: int | None):
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention, eager_attention_forward

    config = GptOssConfig(num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=3, hidden_size=8)
    theirs = GptOssAttention(config, 0).double()
    theirs.sinks.copy_(torch.tensor([0.5, -3.0, 4.0, 0.0]))
    q, k, v = inputs()
    mask = AttentionMask(causal=True, window=window)
    hidden = torch.zeros(1, 1, 3, 5, dtype=torch.float64).masked_fill(~mask.dense(3, 5), -1e30)
    expected, _ = eager_attention_forward(theirs, q, k, v, hidden, scaling=0.7, s_aux=theirs.sinks)
    actual = reference_attention(q, k, v, mask, scale=0.7, sinks=theirs.sinks)
    torch.testing.assert_close(actual.transpose(1, 2), expected)


def test_low_precision_is_computed_in_float32_and_rounded_once():
    q, k, v = inputs(dtype=torch.bfloat16)
    mask = AttentionMask(causal=True)
    exact = reference_attention(q.float(), k.float(), v.float(), mask)
    ours = reference_attention(q, k, v, mask)
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, exact.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(reference_attention(q.float(), k.float(), v.float(), mask), exact)
