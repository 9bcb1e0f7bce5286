"""Vocabulary growth: logits of old tokens stay, and new tokens are the mean of the old ones."""

import pytest
import torch
from test_against_transformers import shaken
from transformers import AutoConfig, AutoModelForCausalLM

from genai_pl.models import ModelConfig, build_model
from genai_pl.models.hf.transformers_model import WrappedDecoder, register
from genai_pl.models.resize import resize_vocabulary

SIZES = {"n_layer": 2, "n_head": 4, "n_embd": 32, "vocab_size": 61, "max_seq_len": 24}
KINDS = {
    "tied": {},
    "untied, with a bias": {"tie_embeddings": False, "head_bias": True},
    "encoder": {"shape": "encoder", "head": "transform", "head_bias": True, "embed_norm": True, "norm_order": "post"},
    "encoder_decoder": {"shape": "encoder_decoder", "position": "relative", "norm": "rmsnorm", "bias": False},
}
IDS = torch.arange(5, 22)[None]


def said(model: torch.nn.Module) -> torch.Tensor:
    extra_inputs = {"decoder_input_ids": IDS} if model.config.shape.value == "encoder_decoder" else {}
    return model(IDS, **extra_inputs)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_old_logits_stay_and_a_new_one_is_their_mean(kind: str):
    model = shaken(build_model(ModelConfig(**SIZES, **KINDS[kind])))
    before = said(model)
    resize_vocabulary(model, 70)
    after = said(model)
    assert after.shape == (1, 17, 70)
    torch.testing.assert_close(after[..., :61], before)
    torch.testing.assert_close(after[..., 61:], before.mean(-1, keepdim=True).expand(-1, -1, 9), rtol=1e-4, atol=1e-5)
    assert model.config.vocab_size == model.embed.num_embeddings == model.lm_head.out_features == 70
    assert (model.lm_head.weight is model.embed.weight) == model.config.tie_embeddings


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_a_model_of_transformers_grows_alike(tied: bool):
    register()
    values = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
    config = AutoConfig.for_model("olmo2", **values, vocab_size=61, pad_token_id=0, tie_word_embeddings=tied)
    model = WrappedDecoder(shaken(AutoModelForCausalLM.from_config(config, attn_implementation="genai_pl")))
    before = model(IDS)
    resize_vocabulary(model, 70)
    torch.testing.assert_close(model(IDS)[..., :61], before)
    mean = before.mean(-1, keepdim=True).expand(-1, -1, 9)
    torch.testing.assert_close(model(IDS)[..., 61:], mean, rtol=1e-4, atol=1e-5)
    assert (model.config.vocab_size, model.inner.config.vocab_size) == (70, 70)
