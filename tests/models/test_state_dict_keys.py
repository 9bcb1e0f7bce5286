"""The keys of state dicts are what they were: checkpoints and exported folders of earlier versions are read by them.

`state_dict_keys.json` was recorded in November 2026, before modules were renamed, from models of one layer. A name that
differs here breaks every checkpoint: rename anything else.
"""

import json
from pathlib import Path

import pytest

from genai_pl.models import ModelConfig, build_model
from tests.small_models import GPT, LLAMA

RECORDED = json.loads(Path(__file__).with_name("state_dict_keys.json").read_text(encoding="utf-8"))
ENCODER = {**GPT, "shape": "encoder"}
POST = {**ENCODER, "norm_order": "post"}
MODELS = {
    "gpt2": GPT,
    "llama": LLAMA,
    "gemma": {**LLAMA, "norm_order": "sandwich", "qk_norm": True, "scale_embeddings": True, "tie_embeddings": True},
    "bert": {**POST, "embed_norm": True, "n_token_types": 2, "head": "transform", "head_bias": True, "pooler": True},
    "albert": {**POST, "embed_norm": True, "share_layers": True, "embedding_size": 32, "head": "transform"},
    "xlnet": {**POST, "position": "xl", "head_bias": True},
    "t5": {**LLAMA, "shape": "encoder_decoder", "position": "relative", "n_decoder_layer": 1, "n_kv_head": 4},
    "reward": {**GPT, "head": "score"},
    "linformer": {**ENCODER, "attention_kind": "linformer"},
}


@pytest.mark.parametrize("name", sorted(RECORDED))
def test_a_state_dict_has_the_recorded_keys(name: str) -> None:
    model = build_model(ModelConfig(**{**MODELS[name], "n_layer": 1}))
    assert sorted(model.state_dict()) == RECORDED[name]
