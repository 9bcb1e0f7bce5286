"""Counts against published figures, torch's own FLOP counter, and what autograd really keeps."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from genai_pl.models import Decoder, ModelConfig, flops_per_token, memory_estimate, n_parameters

SIZES = {"n_layer": 3, "n_head": 4, "n_embd": 64, "vocab_size": 200, "max_seq_len": 32}
LLAMA = {
    **SIZES,
    "position": "rotary",
    "norm": "rmsnorm",
    "activation": "silu",
    "gated_mlp": True,
    "bias": False,
    "n_kv_head": 2,
    "tie_embeddings": False,
}
MODELS = {
    "gpt2": SIZES,
    "llama": LLAMA,
    "qwen3": {**LLAMA, "qk_norm": True, "head_dim": 32},
    "the seed": {**SIZES, "norm_order": "post", "activation": "relu", "position": "sinusoidal"},
    "relu2": {**SIZES, "activation": "relu2", "position": "alibi"},
    "gated relu": {**LLAMA, "activation": "relu"},
    "qk-norm without rotary": {**SIZES, "qk_norm": True},
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


def saved_bytes(model: Decoder, run: Callable[[], Tensor]) -> int:
    """The memory that autograd holds for the backward pass of `run`, parameters left out."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    assert result.requires_grad  # the graph is alive, so no address was used twice
    return sum(size for address, size in storages.items() if address not in parameters)


@pytest.mark.parametrize(
    ("values", "dtype"),
    [*((values, torch.float32) for values in MODELS.values()), (SIZES, torch.bfloat16)],
    ids=[*MODELS, "gpt2 in bfloat16"],
)
def test_activations_take_the_memory_that_autograd_holds(values: dict, dtype: torch.dtype):
    config = ModelConfig(**values)
    model, input_ids = Decoder(config).to(dtype), torch.zeros(4, 32, dtype=torch.long)
    measured = saved_bytes(model, lambda: model(input_ids))
    sizes = {"weight_bytes": dtype.itemsize, "activation_bytes": dtype.itemsize}
    estimate = memory_estimate(model, config, tokens=128, moments=2, **sizes)
    assert estimate.activations == pytest.approx(measured, rel=0.05)


def test_weights_gradients_and_optimizer_state_take_what_they_hold():
    model, config = on_meta(**SIZES), ModelConfig(**SIZES)
    model.embed.requires_grad_(False)
    n, frozen = n_parameters(model), 200 * 64
    estimate = memory_estimate(model, config, tokens=128, weight_bytes=2, activation_bytes=2, moments=2)
    assert (estimate.weights, estimate.gradients, estimate.optimizer) == (2 * n, 2 * (n - frozen), 8 * (n - frozen))
    parts = (estimate.weights, estimate.gradients, estimate.optimizer, estimate.activations, estimate.loss)
    assert estimate.total == sum(parts)
    assert estimate.loss > 128 * 200 * 4
