"""Counts against published figures, and torch's own FLOP counter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from genai_pl.models import Decoder, ModelConfig, flops_per_token, n_active_parameters, n_parameters
from tests.small_models import GPT as SIZES
from tests.small_models import LLAMA
from tests.small_models import MODELS as DECODERS

MODELS = {
    **DECODERS,
    "relu2": {**SIZES, "activation": "relu2", "position": "alibi"},
    "gated relu": {**LLAMA, "activation": "relu"},
    "qk-norm without rotary": {**SIZES, "qk_norm": True},
    "experts": {**LLAMA, "n_experts": 4, "n_shared_experts": 1, "n_dense_layers": 1},
    "experts with biases": {**SIZES, "n_experts": 5, "experts_per_token": 1},
}
every_model = pytest.mark.parametrize("values", MODELS.values(), ids=MODELS)


def on_meta(**values: object) -> Decoder:
    with torch.device("meta"):
        return Decoder(ModelConfig(**values))


@pytest.mark.parametrize(
    ("values", "published"),
    [
        ({"vocab_size": 50257}, 124_439_808),  # GPT-2 small
        ({"vocab_size": 50257, "n_layer": 48, "n_head": 25, "n_embd": 1600}, 1_557_611_200),  # GPT-2 XL
        (
            {**LLAMA, "vocab_size": 49152, "n_layer": 30, "n_head": 9, "n_kv_head": 3, "n_embd": 576}
            | {"tie_embeddings": True},
            134_515_008,  # SmolLM-135M
        ),
        (
            {**LLAMA, "vocab_size": 151_936, "n_layer": 28, "n_head": 16, "n_kv_head": 8, "n_embd": 1024}
            | {"head_dim": 128, "intermediate_size": 3072, "qk_norm": True, "tie_embeddings": True},
            596_049_920,  # Qwen3-0.6B
        ),
    ],
    ids=["gpt2", "gpt2-xl", "smollm", "qwen3"],
)
def test_parameters_are_as_many_as_published(values: dict, published: int):
    assert n_parameters(on_meta(**values)) == published


def test_a_mixture_has_the_total_and_active_parameters_that_are_published():
    mixtral = on_meta(  # Mixtral 8x7B: 46.7B parameters, of which a token passes 12.9B (Jiang et al. 2024)
        **{**LLAMA, "n_layer": 32, "n_embd": 4096, "n_head": 32, "n_kv_head": 8, "vocab_size": 32000},
        intermediate_size=14336,
        n_experts=8,
    )
    assert n_parameters(mixtral) == 46_702_792_704
    assert round(n_active_parameters(mixtral) / 1e9, 1) == 12.9
    dense = on_meta(**LLAMA)
    assert n_active_parameters(dense) == n_parameters(dense)


def test_frozen_parameters_do_not_count_as_trainable():
    model = on_meta(**SIZES)
    model.embed.requires_grad_(False)
    assert n_parameters(model, trainable=True) == n_parameters(model) - 200 * 64


@every_model
def test_flops_are_those_that_torch_counts(values: dict):
    # the reference backend multiplies matrices that torch's counter knows
    config = ModelConfig(**values, attention="reference")
    model, input_ids = Decoder(config), torch.zeros(2, 32, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(input_ids).sum().backward()
    assert flops_per_token(model, config, 32) == pytest.approx(counter.get_total_flops() / input_ids.numel(), rel=0.05)


def test_a_window_limits_the_flops_of_attention():
    model, config = on_meta(**SIZES), ModelConfig(**SIZES)
    windowed = ModelConfig(**SIZES, window=8)
    assert flops_per_token(model, windowed, 32) == flops_per_token(model, config, 8)
    assert flops_per_token(model, windowed, 4) == flops_per_token(model, config, 4)
