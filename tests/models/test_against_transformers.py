"""Logits equal to transformers' from the same folder, in both directions, for every family of decoders."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from genai_pl.models import Decoder, ModelConfig, load_pretrained, save_pretrained
from genai_pl.models.hf.config import family_of

GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 24, "vocab_size": 61}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 24,
    "rope_theta": 500.0,
    "vocab_size": 61,
}
GEMMA3 = {
    **{k: v for k, v in LLAMA.items() if k != "rope_theta"},
    "model_type": "gemma3_text",
    "num_hidden_layers": 2,
    "sliding_window": 5,
    "query_pre_attn_scalar": 24,
    "pad_token_id": 0,
}
THEIRS = {
    "gpt2": GPT2,
    "gpt2_untied": {**GPT2, "tie_word_embeddings": False, "n_inner": 48, "activation_function": "gelu"},
    "llama": LLAMA,
    "llama_tied": {**LLAMA, "tie_word_embeddings": True, "num_key_value_heads": 4, "head_dim": 8},
    "llama_biased": {**LLAMA, "attention_bias": True},
    "mistral": {**LLAMA, "model_type": "mistral", "sliding_window": 5},
    "mistral_without_window": {**LLAMA, "model_type": "mistral", "sliding_window": None},
    "qwen2": {**LLAMA, "model_type": "qwen2", "head_dim": 8},
    "qwen3": {**LLAMA, "model_type": "qwen3"},
    "llama_linear": {**LLAMA, "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}},
    "llama_3_1": {
        **LLAMA,
        "rope_parameters": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
            "rope_theta": 500.0,
        },
    },
    "qwen3_yarn": {
        **LLAMA,
        "model_type": "qwen3",
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 128,
            "rope_theta": 500.0,
            "beta_fast": 20.0,
        },
    },
    "gemma3": GEMMA3,
    "gemma3_one_in_two": {
        **GEMMA3,
        "layer_types": ["sliding_attention", "full_attention"],
        "final_logit_softcapping": 5.0,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 500.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
        },
    },
    "qwen3_relu2": {**LLAMA, "model_type": "qwen3", "hidden_act": "relu2", "tie_word_embeddings": True},
}

SIZES = {"n_layer": 2, "n_head": 4, "n_embd": 32, "vocab_size": 61, "max_seq_len": 24}
MODERN = {**SIZES, "position": "rotary", "norm": "rmsnorm", "activation": "silu", "gated_mlp": True, "bias": False}
OURS = {
    "GPT2LMHeadModel": {**SIZES, "dropout": 0.2},
    "LlamaForCausalLM": {**MODERN, "n_kv_head": 2, "rope_theta": 500.0, "tie_embeddings": False},
    "MistralForCausalLM": {**MODERN, "n_kv_head": 2, "head_dim": 16, "window": 5},
    "Qwen2ForCausalLM": {**MODERN, "n_kv_head": 2, "qkv_bias": True},
    "Qwen3ForCausalLM": {**MODERN, "n_kv_head": 1, "qk_norm": True, "activation": "relu2"},
}
GEMMA = {
    **MODERN,
    "activation": "gelu_tanh",
    "norm_order": "sandwich",
    "qk_norm": True,
    "scale_embeddings": True,
    "window": 5,
    "full_every": 2,
    "rope_theta_local": 50.0,
}
OURS |= {
    "Gemma3ForCausalLM": GEMMA,
    "LlamaForCausalLM  ": {**MODERN, "qkv_bias": True, "o_bias": True},
    "LlamaForCausalLM ": {**MODERN, "rope_scaling": {"kind": "llama3", "factor": 8.0, "original_max_seq_len": 16}},
    "Qwen3ForCausalLM ": {**MODERN, "qk_norm": True, "rope_scaling": {"kind": "yarn", "factor": 4.0}},
}
NATIVE = {
    "alibi": {**SIZES, "position": "alibi"},
    "post_norm": {**SIZES, "position": "sinusoidal", "norm_order": "post", "activation": "relu"},
    "relu2_without_gate": {**MODERN, "activation": "relu2", "gated_mlp": False},
    "softcaps": {**MODERN, "softcap": 5.0, "logit_softcap": 10.0},
    "gpt2_with_grouped_keys": {**SIZES, "n_kv_head": 2},
    "gpt2_without_biases": {**SIZES, "bias": False},
    "window_with_qk_norm": {**MODERN, "window": 5, "qk_norm": True},
}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}


def shaken(model: nn.Module) -> nn.Module:
    """The model with every parameter drawn anew, so that no norm is 1 and no bias 0."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        centre = 1.0 if "norm" in name or "ln_" in name else 0.0
        nn.init.normal_(parameter, mean=centre, std=0.2, generator=generator)
    return model.eval()


def build_theirs(values: dict) -> nn.Module:
    values = dict(values)
    return shaken(AutoModelForCausalLM.from_config(AutoConfig.for_model(values.pop("model_type"), **values)))


def build_ours(values: dict) -> Decoder:
    return shaken(Decoder(ModelConfig(**values)))


@pytest.fixture
def input_ids() -> Tensor:
    return torch.randint(61, (2, 17), generator=torch.Generator().manual_seed(1))


def edit(file: Path, **values: object) -> None:
    """Change some keys of a JSON file; ... removes one."""
    old = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in {**old, **values}.items() if v is not ...}))


@pytest.mark.parametrize("values", THEIRS.values(), ids=THEIRS)
def test_imported_models_give_the_logits_of_transformers(values: dict, tmp_path: Path, input_ids: Tensor):
    theirs = build_theirs(values)
    theirs.save_pretrained(tmp_path)
    ours = load_pretrained(tmp_path)
    torch.testing.assert_close(ours(input_ids), theirs(input_ids).logits, rtol=0, atol=1e-5)
    assert not ours.training


@pytest.mark.parametrize("values", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_imported_parameters_own_their_memory_and_know_how_they_were_drawn(values: dict, tmp_path: Path):
    build_theirs({**values, "initializer_range": 0.07}).save_pretrained(tmp_path)
    ours = load_pretrained(tmp_path)
    assert ours.config.init_std == 0.07
    for name, parameter in ours.named_parameters():
        assert parameter.untyped_storage().nbytes() == 4 * parameter.numel(), name
        assert parameter.requires_grad, name


@pytest.mark.parametrize(("architecture", "values"), OURS.items(), ids=OURS)
def test_transformers_gives_the_logits_of_exported_models(
    architecture: str, values: dict, tmp_path: Path, input_ids: Tensor
):
    ours, architecture = build_ours(values), architecture.strip()
    assert save_pretrained(ours, tmp_path, token_ids=TOKENS) == architecture
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(theirs).__name__ == architecture
    assert not any(info.values()), info
    assert (theirs.config.bos_token_id, theirs.config.eos_token_id) == (1, 2)
    assert theirs.generation_config.eos_token_id == 2
    torch.testing.assert_close(theirs(input_ids).logits, ours(input_ids), rtol=0, atol=1e-4)
    torch.testing.assert_close(load_pretrained(tmp_path)(input_ids), ours(input_ids), rtol=0, atol=0)


def test_dropout_of_gpt2_is_exported(tmp_path: Path):
    save_pretrained(build_ours(OURS["GPT2LMHeadModel"]), tmp_path, token_ids=TOKENS)
    config = AutoConfig.from_pretrained(tmp_path)
    assert (config.attn_pdrop, config.embd_pdrop, config.resid_pdrop) == (0.2, 0.2, 0.2)


@pytest.mark.parametrize("values", NATIVE.values(), ids=NATIVE)
def test_what_no_family_expresses_makes_a_round_trip_in_our_own_layout(values: dict, tmp_path: Path, input_ids: Tensor):
    ours = build_ours(values)
    assert save_pretrained(ours, tmp_path, token_ids=TOKENS) == "genai_pl"
    again = load_pretrained(tmp_path)
    assert again.config == ours.config
    assert torch.equal(again(input_ids), ours(input_ids))
    assert (again.lm_head.weight is again.embed.weight) == ours.config.tie_embeddings


def test_no_family_claims_what_it_would_change():
    assert family_of(ModelConfig(**{**MODERN, "head_dim": 6, "n_head": 5})).model_type == "mistral"  # Llama divides too
    assert family_of(ModelConfig(**{**SIZES, "head_dim": 6, "n_head": 5})) is None  # GPT-2 divides n_embd by n_head


@pytest.mark.parametrize("key", ["rope_parameters", "rope_theta"])
def test_the_rotary_base_is_found_where_old_and_new_transformers_keep_it(key: str, tmp_path: Path, input_ids: Tensor):
    theirs = build_theirs(LLAMA)
    theirs.save_pretrained(tmp_path)
    if key == "rope_theta":
        edit(tmp_path / "config.json", rope_parameters=..., rope_theta=500.0, rope_scaling=None)
    assert key in json.loads((tmp_path / "config.json").read_text())
    assert load_pretrained(tmp_path).config.rope_theta == 500.0


def test_the_rotary_base_is_written_where_old_and_new_transformers_read_it(tmp_path: Path):
    save_pretrained(build_ours(OURS["LlamaForCausalLM"]), tmp_path, token_ids=TOKENS)
    values = json.loads((tmp_path / "config.json").read_text())
    assert values["rope_theta"] == values["rope_parameters"]["rope_theta"] == 500.0


def test_missing_keys_mean_what_they_mean_to_transformers(tmp_path: Path, input_ids: Tensor):
    needed = ("num_hidden_layers", "intermediate_size", "vocab_size", "max_position_embeddings")
    llama = {**{key: LLAMA[key] for key in needed}, "num_attention_heads": 64, "hidden_size": 128}
    for values in (GPT2, *({**llama, "model_type": kind} for kind in ("llama", "mistral", "qwen2", "qwen3"))):
        theirs = build_theirs(values)
        theirs.save_pretrained(tmp_path)
        (tmp_path / "config.json").write_text(json.dumps(values))
        torch.testing.assert_close(load_pretrained(tmp_path)(input_ids), theirs(input_ids).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("values", [GPT2, {**LLAMA, "tie_word_embeddings": True}], ids=["gpt2", "llama"])
def test_a_file_of_the_headless_model_is_read(values: dict, tmp_path: Path, input_ids: Tensor):
    theirs = build_theirs(values)
    theirs.base_model.save_pretrained(tmp_path)
    torch.testing.assert_close(load_pretrained(tmp_path)(input_ids), theirs(input_ids).logits, rtol=0, atol=1e-5)


def test_shards_are_read(tmp_path: Path, input_ids: Tensor):
    theirs = build_theirs(LLAMA)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    torch.testing.assert_close(load_pretrained(tmp_path)(input_ids), theirs(input_ids).logits, rtol=0, atol=1e-5)


def test_weights_keep_the_dtype_that_is_asked_for_and_written(tmp_path: Path):
    ours = build_ours(OURS["LlamaForCausalLM"]).to(torch.bfloat16)
    save_pretrained(ours, tmp_path, token_ids=TOKENS)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype is torch.bfloat16
    assert {p.dtype for p in load_pretrained(tmp_path).parameters()} == {torch.float32}
    assert {p.dtype for p in load_pretrained(tmp_path, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}
