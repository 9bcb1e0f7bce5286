"""An exported folder has what vLLM and TGI read of it, as transformers' own save_pretrained writes it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from genai_pl.data import byte_tokenizer
from genai_pl.data.prompt_tokens import ensure_template
from genai_pl.exporting import export_model
from genai_pl.models import load_pretrained

TOKENIZER = byte_tokenizer()
V = len(TOKENIZER)
LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 24,
    "vocab_size": V,
}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
FAMILIES = {
    "gpt2": {
        "model_type": "gpt2",
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 24,
        "n_inner": 128,
        "vocab_size": V,
    },
    "llama": {"model_type": "llama", **LLAMA, **ROPE},
    "llama_tied_and_scaled": {"model_type": "llama", **LLAMA, "tie_word_embeddings": True, "rope_parameters": LLAMA3},
    "mistral": {"model_type": "mistral", **LLAMA, **ROPE, "sliding_window": 5},
    "qwen2": {"model_type": "qwen2", **LLAMA, **ROPE, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", **LLAMA, **ROPE},
    "gemma3": {"model_type": "gemma3_text", **LLAMA, "sliding_window": 5, "query_pre_attn_scalar": 24},
}
# what vllm/config/model.py, vllm/transformers_utils/config.py and the models of both servers ask of config.json
READ = (
    "architectures", "model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "intermediate_size", "max_position_embeddings", "hidden_act", "rms_norm_eps",
    "layer_norm_epsilon", "rope_parameters", "tie_word_embeddings", "sliding_window", "layer_types", "attention_bias",
    "mlp_bias", "query_pre_attn_scalar", "final_logit_softcapping", "attn_logit_softcapping", "dtype",
    "bos_token_id", "eos_token_id", "pad_token_id", "n_inner", "activation_function", "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx", "quantization_config",
)  # fmt: skip


@pytest.fixture(scope="module", params=FAMILIES)
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model as transformers saves it, and as we export what we read of that."""
    theirs, ours = (tmp_path_factory.mktemp(request.param) / name for name in ("theirs", "ours"))
    ids = {f"{kind}_token_id": getattr(TOKENIZER, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**FAMILIES[request.param], **ids}))
    model.to(torch.bfloat16).save_pretrained(theirs)
    tokenizer = byte_tokenizer()
    ensure_template(tokenizer)
    export_model(load_pretrained(theirs, dtype=torch.bfloat16), tokenizer, ours, card={})
    return theirs, ours


def test_the_configuration_says_what_transformers_says(folders: tuple[Path, Path]):
    theirs, ours = (AutoConfig.from_pretrained(folder) for folder in folders)
    different = {
        name: (getattr(ours, name, None), getattr(theirs, name, None))
        for name in READ
        if getattr(ours, name, None) != getattr(theirs, name, None)
    }
    assert different == {}


def test_the_file_itself_names_class_and_family(folders: tuple[Path, Path]):
    theirs, ours = (json.loads((folder / "config.json").read_text()) for folder in folders)
    for name in ("architectures", "model_type", "dtype", "eos_token_id", "bos_token_id"):
        assert ours[name] == theirs[name]


def test_the_tensors_have_the_names_shapes_and_values_of_transformers(folders: tuple[Path, Path]):
    tensors = []
    for folder in folders:
        with safe_open(folder / "model.safetensors", "pt") as file:
            tensors.append({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118  it is no dictionary
    theirs, ours = tensors
    assert sorted(ours) == sorted(theirs)
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in theirs)


def test_generation_ends_where_the_tokenizer_says(folders: tuple[Path, Path]):
    config = GenerationConfig.from_pretrained(folders[1])
    assert config.eos_token_id == TOKENIZER.eos_token_id
    assert config.bos_token_id == TOKENIZER.bos_token_id
    assert config.pad_token_id == TOKENIZER.pad_token_id


def test_the_tokenizer_and_its_chat_template_are_beside_it(folders: tuple[Path, Path]):
    ours = folders[1]
    assert (ours / "tokenizer.json").is_file()
    assert (ours / "tokenizer_config.json").is_file()
    tokenizer = AutoTokenizer.from_pretrained(ours)
    assert tokenizer.decode(tokenizer("Grüße 你好")["input_ids"], skip_special_tokens=True) == "Grüße 你好"
    messages = [{"role": "user", "content": "hello"}]
    assert "hello" in tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
