"""The parts of a model against formulas and implementations that are not ours."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from genai_pl.config.enums import Activation
from genai_pl.kernels import AttentionMask
from genai_pl.models import Block, Decoder, ModelConfig
from genai_pl.models.attention import Attention
from genai_pl.models.hf.families import ACTIVATIONS
from genai_pl.models.layers import build_activation, build_norm
from genai_pl.models.positions import alibi_slopes, rotary, rotate, sinusoidal

CAUSAL = AttentionMask(causal=True)


def noise(*size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(0))


def test_sinusoids_are_those_of_the_paper():
    expected = np.zeros((7, 10))
    for position in range(7):
        for i in range(5):
            expected[position, 2 * i] = math.sin(position / 10000 ** (2 * i / 10))
            expected[position, 2 * i + 1] = math.cos(position / 10000 ** (2 * i / 10))
    np.testing.assert_allclose(sinusoidal(torch.arange(7), n_embd=10), expected, atol=1e-6)
    np.testing.assert_allclose(sinusoidal(torch.tensor([[3, 0]]), n_embd=9)[0], expected9(3, 0), atol=1e-6)


def expected9(*positions: int) -> np.ndarray:
    """Nine channels: the last sine has no cosine."""
    return np.array(
        [[(math.cos if c % 2 else math.sin)(p / 10000 ** ((c - c % 2) / 9)) for c in range(9)] for p in positions]
    )


def test_rotary_positions_are_those_of_llama():
    config = LlamaConfig(hidden_size=32, num_attention_heads=2, rope_theta=700.0, max_position_embeddings=64)
    q, k = noise(2, 2, 5, 16), noise(2, 1, 5, 16)
    positions = torch.tensor([[0, 1, 2, 3, 4], [60, 0, 1, 0, 33]])
    expected = apply_rotary_pos_emb(q, k, *LlamaRotaryEmbedding(config)(q, positions))
    table = rotary(positions, head_dim=16, theta=700.0)
    torch.testing.assert_close((rotate(q, table), rotate(k, table)), expected, rtol=0, atol=1e-5)
    row = rotary(positions[1], head_dim=16, theta=700.0)
    torch.testing.assert_close(rotate(q[1:], row), expected[0][1:], rtol=0, atol=1e-5)


def test_alibi_slopes_are_the_published_ones():
    assert alibi_slopes(8).tolist() == [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]
    interleaved = [2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5]  # every second of the 16 heads' slopes
    assert alibi_slopes(12).tolist() == pytest.approx([2.0**-n for n in range(1, 9)] + interleaved)
    assert alibi_slopes(1).tolist() == [2.0**-8]


def test_alibi_lowers_scores_by_slope_times_distance():
    config = ModelConfig(n_embd=16, n_head=4, vocab_size=5, position="alibi", bias=False)
    attention, x = Attention(config, 0), noise(1, 6, 16)
    q, k, v = (p(x).view(6, 4, 4).transpose(0, 1) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
    scores = q @ k.transpose(1, 2) / 2  # (H, T, T), divided by the root of head_dim
    for head, slope in enumerate([2**-2, 2**-4, 2**-6, 2**-8]):
        for i in range(6):
            for j in range(6):
                scores[head, i, j] += -slope * (i - j) if j <= i else -math.inf
    expected = attention.o_proj((scores.softmax(-1) @ v).transpose(0, 1).reshape(1, 6, 16))
    torch.testing.assert_close(attention(x, CAUSAL), expected)


def test_a_post_norm_block_is_the_encoder_layer_of_torch():
    """LayerNorm(x + MultiHead(x)), then LayerNorm(x + FFN(x)): the seed's equations 11 and 12."""
    config = ModelConfig(
        n_embd=32, n_head=4, intermediate_size=48, norm_order="post", activation="relu", position="sinusoidal"
    )
    block = Block(config, 0)
    theirs = nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=True)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.5)
    attention = block.attention
    with torch.no_grad():
        for ours, whole in (("weight", "in_proj_weight"), ("bias", "in_proj_bias")):
            for proj, part in zip("qkv", getattr(theirs.self_attn, whole).chunk(3), strict=True):
                getattr(attention, f"{proj}_proj").get_parameter(ours).copy_(part)
    attention.o_proj.load_state_dict(theirs.self_attn.out_proj.state_dict())
    for ours, name in ((block.norm1, "norm1"), (block.norm2, "norm2"), (block.mlp.up_proj, "linear1")):
        ours.load_state_dict(theirs.get_submodule(name).state_dict())
    block.mlp.down_proj.load_state_dict(theirs.linear2.state_dict())
    x = noise(2, 7, 32)
    hidden = nn.Transformer.generate_square_subsequent_mask(7)
    torch.testing.assert_close(block(x, CAUSAL), theirs(x, src_mask=hidden), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "activation"), ACTIVATIONS.items())
def test_activations_are_those_of_transformers(name: str, activation: Activation):
    x = 3 * noise(200)
    torch.testing.assert_close(build_activation(activation)(x), ACT2FN[name](x))


def test_relu2_squares_what_is_positive():
    x = torch.tensor([-2.0, 0.0, 0.5, 3.0])
    assert build_activation(Activation.relu2)(x).tolist() == [0.0, 0.0, 0.25, 9.0]


def test_norms_are_their_formulas():
    x = noise(3, 8) * 4 + 1
    config = ModelConfig(n_embd=8, n_head=2, norm_eps=0.01)
    centred = x.numpy() - x.numpy().mean(-1, keepdims=True)
    layernorm = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 0.01)
    np.testing.assert_allclose(build_norm(config, 8)(x).detach(), layernorm, rtol=1e-5, atol=1e-6)
    config = ModelConfig(n_embd=8, n_head=2, norm_eps=0.01, norm="rmsnorm")
    rmsnorm = x.numpy() / np.sqrt((x.numpy() ** 2).mean(-1, keepdims=True) + 0.01)
    np.testing.assert_allclose(build_norm(config, 8)(x).detach(), rmsnorm, rtol=1e-5)


EXPECTED_STD = {  # the table in genai_pl/models/init.py, for init_std 0.05 and 8 layers
    "embed.weight": 0.05,
    "position.weight": 0.05,
    "lm_head.weight": 0.05,
    **{f"{name}_proj.weight": 0.05 for name in ("q", "k", "v", "gate", "up")},
    **{f"{name}_proj.weight": 0.05 / 4 for name in ("o", "down")},
}


def test_initial_weights_follow_the_table():
    torch.manual_seed(0)
    config = ModelConfig(
        n_layer=8,
        n_head=2,
        n_embd=96,
        vocab_size=300,
        init_std=0.05,
        gated_mlp=True,
        qk_norm=True,
        tie_embeddings=False,
    )
    for name, parameter in Decoder(config).named_parameters():
        kinds = [kind for kind in EXPECTED_STD if name.endswith(kind)]
        if kinds:
            assert parameter.std().item() == pytest.approx(EXPECTED_STD[kinds[0]], rel=0.03), name
            assert abs(parameter.mean().item()) < 5 * parameter.std().item() / parameter.numel() ** 0.5, name
        else:
            assert torch.all(parameter == float("norm" in name and name.endswith("weight"))), name


def test_the_seed_decides_the_initial_weights():
    config = ModelConfig(n_layer=1, n_head=2, n_embd=16, vocab_size=20)
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        states.append(Decoder(config).state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["embed.weight"], states[2]["embed.weight"])
