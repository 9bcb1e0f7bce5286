"""Fields of config.json met in the wild: right under init_from= and under model=hf, or refused by name; never ignored."""

import json
from pathlib import Path

import pytest
import torch
from one_family import built, native, near, packed, wrapped
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from genai_pl.data import byte_tokenizer
from genai_pl.errors import CheckpointError
from genai_pl.loading import load
from genai_pl.models import load_pretrained
from genai_pl.models.hf.config import is_supported
from genai_pl.models.hf.transformers_model import load_wrapped

RIGHT, NO_FAMILY = "right", "no family of ours"
ROPE = {"rope_theta": 500.0, "factor": 4.0}
YARN = {**ROPE, "rope_type": "yarn", "original_max_position_embeddings": 16}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
LONG = {"rope_type": "longrope", "short_factor": [1.0, 1.5, 2.0, 1.2], "long_factor": [1.0, 3.0, 5.0, 9.0]}
LOCAL = {"rope_type": "default", "rope_theta": 77.0}


def rope(**values: object) -> dict[str, object]:
    return {"rope_parameters": values}


FIELDS = {  # name: model_type, values, what init_from= does: RIGHT, or a part of the line that refuses
    "linear": ("llama", rope(**ROPE, rope_type="linear"), RIGHT),
    "yarn": ("qwen3", rope(**YARN), RIGHT),
    "yarn with a factor of its own": ("llama", rope(**YARN, attention_factor=0.7), RIGHT),
    "yarn of DeepSeek": ("llama", rope(**YARN, mscale=0.7, mscale_all_dim=0.3), RIGHT),
    "yarn between channels": ("gpt_oss", rope(**YARN, truncate=False), RIGHT),
    "llama3": ("mistral", rope(**ROPE, **LLAMA3, rope_type="llama3"), RIGHT),
    "dynamic": (
        "llama", {**rope(**ROPE, rope_type="dynamic"), "max_position_embeddings": 10}, "rope_type='dynamic' are not supported"
    ),
    "longrope": (
        "mistral", {**rope(**ROPE, **LONG), "original_max_position_embeddings": 9}, "rope_type='longrope' are not supported"
    ),
    "proportional": (
        "llama", rope(rope_theta=500.0, rope_type="proportional", partial_rotary_factor=0.5),
        "rope_type='proportional' are not supported",
    ),
    "partial rotary": (
        "phi", rope(rope_type="default", rope_theta=500.0, partial_rotary_factor=0.25), NO_FAMILY
    ),
    "two bases": ("gemma3_text", rope(full_attention={**ROPE, "rope_type": "linear"}, sliding_attention=LOCAL), RIGHT),
    "scaled windows": (
        "gemma3_text", rope(full_attention=LOCAL, sliding_attention={**ROPE, "rope_type": "linear"}),
        "scaled rotary positions in windowed layers are not supported",
    ),
    "no positions in some layers": ("smollm3", {"no_rope_layers": [1, 0]}, NO_FAMILY),
    "kinds of layers": ("gemma3_text", {"layer_types": ["full_attention"] * 2, "num_hidden_layers": 2}, RIGHT),
    "kinds of layers in a Mistral": (
        "mistral", {"layer_types": ["sliding_attention", "full_attention"], "num_hidden_layers": 2}, RIGHT
    ),
    "kinds of layers in a Mistral, all full": ("mistral", {"layer_types": ["full_attention"] * 2}, RIGHT),
    "kinds of layers without a period": (
        "gpt_oss", {"layer_types": ["full_attention", "sliding_attention"], "num_hidden_layers": 2}, "layer_types="
    ),
    "windows in the last layers": ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}, "use_sliding_window=True"),
    "biases of attention": ("qwen3", {"attention_bias": True}, RIGHT),
    "biases of attention beside experts": ("olmoe", {"attention_bias": True}, RIGHT),
    "biases of attention and two norms": ("gemma3_text", {"attention_bias": True}, RIGHT),
    "no biases of attention": ("gpt_oss", {"attention_bias": False}, RIGHT),
    "biases of MLPs": ("llama", {"mlp_bias": True}, "mlp_bias=True"),
    "size of heads": ("mixtral", {"head_dim": 12}, RIGHT),
    "cut queries": ("olmoe", {"clip_qkv": 0.3}, "clip_qkv=0.3"),
    "cut queries of a dense model": ("olmo", {"clip_qkv": 0.3}, NO_FAMILY),
    "groups of experts": ("dots1", {"n_group": 2, "topk_group": 1}, "n_group=2"),
    "gate of experts": ("gpt_oss", {"swiglu_limit": 0.2, "swiglu_alpha": 0.5}, RIGHT),
    "capped logits": ("gemma3_text", {"final_logit_softcapping": 1.0}, RIGHT),
    "factors of Granite": (
        "granite", {"logits_scaling": 3.0, "attention_multiplier": 0.3, "embedding_multiplier": 2.0}, NO_FAMILY
    ),
    "factor of Cohere": ("cohere", {"logit_scale": 0.5}, NO_FAMILY),
    "factor of Cohere 2": ("cohere2", {"logit_scale": 0.5}, NO_FAMILY),
    "scores by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
}  # fmt: skip


def usual(kind: str, values: dict[str, object]) -> nn.Module:
    """The family's model without the values, but for sizes."""
    sizes = {"num_hidden_layers", "max_position_embeddings"}
    return built(kind, **{name: value for name, value in values.items() if name in sizes})


@pytest.mark.parametrize(("kind", "values", "verdict"), FIELDS.values(), ids=FIELDS)
@torch.no_grad()
def test_a_field_is_computed_or_refused_by_its_name(kind: str, values: dict, verdict: str, tmp_path: Path):
    theirs = built(kind, **values)
    theirs.save_pretrained(tmp_path)
    tokens = torch.randint(3, 64, (2, 13), generator=torch.Generator().manual_seed(1))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()  # of no earlier texts
    expected = theirs(tokens).logits
    # the field matters: without it the same weights give other logits
    if "head_dim" not in values:  # other weights
        plain = usual(kind, values)
        plain.load_state_dict(theirs.state_dict(), strict=False)
        assert not near(plain(tokens).logits, expected)
    models = [load_wrapped(str(tmp_path))]
    if verdict == NO_FAMILY:
        assert not is_supported(tmp_path / "config.json")
    elif verdict == RIGHT:
        models.append(load_pretrained(tmp_path))
    else:
        with pytest.raises(CheckpointError) as refused:
            load_pretrained(tmp_path)
        assert verdict in str(refused.value)
        assert str(refused.value).endswith(f"try transformers' layers: model=hf model.name={tmp_path}")
        assert "\n" not in str(refused.value)
    for ours in models:
        assert near(ours(tokens), expected)
        assert packed(theirs, ours, tokens)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "values", "verdict"), FIELDS.values(), ids=FIELDS)
def test_a_field_that_is_computed_is_right_in_text_gradients_and_folders(
    kind: str, values: dict, verdict: str, tmp_path: Path
):
    theirs = built(kind, **values)
    outcome = wrapped(theirs, tmp_path / "wrapped")
    assert (outcome.refused, outcome.wrong) == (None, ())
    if verdict == RIGHT:
        outcome = native(theirs, tmp_path / "native")
        assert (outcome.refused, outcome.wrong, outcome.partly) == (None, (), {})


@pytest.mark.parametrize("kind", ["llama", "gpt_oss"])
@torch.no_grad()
def test_a_head_in_the_file_counts_whatever_the_flag_of_ties_says(kind: str, tmp_path: Path):
    built(kind, tie_word_embeddings=True).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in weights
    head = torch.randn(weights["model.embed_tokens.weight"].shape, generator=torch.Generator().manual_seed(2))
    save_file({**weights, "lm_head.weight": head}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"]
    tokens = torch.randint(3, 64, (2, 13), generator=torch.Generator().manual_seed(1))
    for ours in (load_pretrained(tmp_path), load_wrapped(str(tmp_path))):
        torch.testing.assert_close(ours(tokens), ours.features(tokens) @ head.T, rtol=0, atol=1e-4)


@pytest.mark.parametrize("wrap", [False, True])
def test_every_token_of_a_list_of_ends_ends_a_text(wrap: bool, tmp_path: Path):
    tokenizer = byte_tokenizer()
    built("llama", vocab_size=len(tokenizer), eos_token_id=[7, 11]).save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    tokenizer.save_pretrained(tmp_path)
    model = load(str(tmp_path), wrap=wrap).model
    assert {7, 11} <= {*model.config.eos_token_ids}
