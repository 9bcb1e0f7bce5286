"""Fused decoding: a prepared decoder takes shorter steps to the same tokens, and refuses to train."""

import pytest
import torch

from genai_pl import peft
from genai_pl.config.generation import GenerationConfig
from genai_pl.generation import generate
from genai_pl.models import Decoder, ModelConfig, build_model, prepare_for_decoding
from genai_pl.models.kv_cache import SlotCache

LLAMA = {"position": "rotary", "norm": "rmsnorm", "gated_mlp": True, "activation": "silu", "bias": False}
KINDS = {
    "llama": {"n_kv_head": 2},
    "qwen2": {"qkv_bias": True, "n_kv_head": 1},
    "gemma": {"activation": "gelu_tanh", "scale_embeddings": True, "head_dim": 12},
    "softcap": {"softcap": 5.0, "attention": "reference", "logit_softcap": 8.0},
    "qwen3": {"qk_norm": True, "n_kv_head": 2},
    "gpt2": {"position": "learned", "norm": "layernorm", "gated_mlp": False, "activation": "gelu", "bias": True},
    "sinks": {"attention_sinks": True, "activation": "clamped_swiglu", "swiglu_limit": 0.3},
    "normed": {"position": "sinusoidal", "norm": "layernorm", "qk_norm": True, "bias": True, "embed_norm": True},
}


def build(**options: object) -> Decoder:
    torch.manual_seed(0)
    sizes = {"n_layer": 3, "n_head": 4, "n_embd": 32, "vocab_size": 60, "max_seq_len": 64, "init_std": 0.3}
    model = build_model(ModelConfig(**{**sizes, **LLAMA, **options})).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:  # norms and biases, which begin as 1 and 0
            parameter.data.add_(torch.randn_like(parameter), alpha=0.3)
    return model


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_steps_give_the_states_and_tokens_of_the_whole(kind: str) -> None:
    model, plain = build(**KINDS[kind]), build(**KINDS[kind])
    assert prepare_for_decoding(model)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    ids = torch.randint(0, 60, (3, 12), generator=torch.Generator().manual_seed(1))
    segments = (torch.arange(12) >= torch.tensor([0, 3, 7])[:, None]).long()  # padded on the left
    for segment_ids in (None, segments):
        cache = model.new_cache(3, 12)
        model.features(ids[:, :8], None if segment_ids is None else segment_ids[:, :8], cache=cache)
        states = [model.features(ids[:, n : n + 1], cache=cache) for n in range(8, 12)]
        expected = plain.features(ids, segment_ids)[:, 8:]
        torch.testing.assert_close(torch.cat(states, 1), expected, atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(model.features(ids, segment_ids)[:, 8:], expected, atol=2e-5, rtol=1e-5)
    config = GenerationConfig(max_new_tokens=80, temperature=0)  # beyond the context
    for segment_ids in (None, segments):
        assert torch.equal(
            generate(model, ids, config, segment_ids=segment_ids), generate(plain, ids, config, segment_ids=segment_ids)
        )


@torch.no_grad()
def test_rows_of_unequal_length_share_a_step() -> None:
    model, plain = build(n_kv_head=2), build(n_kv_head=2)
    assert prepare_for_decoding(model)
    slots = SlotCache(2)
    for row in ([1, 2, 3, 4, 5], [7, 8]):
        cache = model.new_cache(1, len(row))
        model.features(torch.tensor([row]), cache=cache)
        slots.add_sequence(cache)
    slots.ensure_capacity()
    actual = model.features(torch.tensor([[6], [9]]), cache=slots)
    for n, row in enumerate(([1, 2, 3, 4, 5, 6], [7, 8, 9])):
        torch.testing.assert_close(actual[n, -1], plain.features(torch.tensor([row]))[0, -1], atol=2e-5, rtol=1e-5)


OTHERS = {
    "relative": lambda: build(position="relative"),
    "windows": lambda: build(window=8),
    "post_norm": lambda: build(norm_order="post"),
    "adapter": lambda: peft.lora(build(), rank=2),
    "prefix": lambda: peft.prefix(build(), n_tokens=2),
    "encoder": lambda: build_model(ModelConfig(n_layer=1, n_head=2, n_embd=16, vocab_size=60, shape="encoder")),
}


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_prepared_model_refuses_training_mode_and_says_why(kind: str) -> None:
    model = build(**KINDS[kind])
    assert prepare_for_decoding(model)
    with pytest.raises(RuntimeError, match=r"prepared for decoding.*load it again to train it"):
        model.train()
    assert model.eval() is model
    assert not model.training


@pytest.mark.parametrize("name", OTHERS)
def test_other_models_stay_as_they_are(name: str) -> None:
    model = OTHERS[name]()
    assert not prepare_for_decoding(model)
    assert getattr(model, "fused", None) is None
