"""Small models of the families that llama.cpp computes, with large random weights: configurations of transformers."""

from pathlib import Path

import torch
from small_tokenizers import byte_level_bpe

from genai_pl.data.tokenizer import save_tokenizer

V = 400  # of `byte_level_bpe`
LLAMA = {
    "model_type": "llama",
    "vocab_size": V,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "initializer_range": 0.2,
}
UNTIED_HEADS = {key: value for key, value in LLAMA.items() if key != "model_type"}
MIXTURE = {**UNTIED_HEADS, "num_experts": 4, "num_experts_per_tok": 2}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
GPT_OSS = {
    **UNTIED_HEADS,
    "model_type": "gpt_oss",
    "head_dim": 32,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 4,
    "sliding_window": 16,
    "rope_parameters": YARN,
}
MODELS = {
    "gpt2": {
        "model_type": "gpt2", "vocab_size": V, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256,
        "initializer_range": 0.2,
    },
    "llama": LLAMA,
    "llama3": {**LLAMA, "rope_parameters": LLAMA3, "head_dim": 32, "attention_bias": True, "tie_word_embeddings": True},
    "llama_linear": {**LLAMA, "rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0}},
    "mistral": {**LLAMA, "model_type": "mistral", "sliding_window": None},
    "mixtral": {**UNTIED_HEADS, "model_type": "mixtral", "num_local_experts": 4},
    "qwen2": {**LLAMA, "model_type": "qwen2"},
    "qwen2_yarn": {**LLAMA, "model_type": "qwen2", "rope_parameters": {**YARN, "attention_factor": 1.3}},
    "qwen3": {**LLAMA, "model_type": "qwen3", "head_dim": 32, "tie_word_embeddings": True},
    "qwen3_moe": {**MIXTURE, "model_type": "qwen3_moe", "moe_intermediate_size": 64, "norm_topk_prob": True, "head_dim": 32},
    "olmoe": {**MIXTURE, "model_type": "olmoe", "pad_token_id": 0, "num_key_value_heads": 4},
    "dots1": {
        **UNTIED_HEADS, "model_type": "dots1", "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 2,
        "moe_intermediate_size": 64, "first_k_dense_replace": 1, "routed_scaling_factor": 2.5, "sliding_window": None,
        "num_key_value_heads": 4,
    },
    "gpt_oss": GPT_OSS,
    "gemma3": {
        **UNTIED_HEADS, "model_type": "gemma3_text", "head_dim": 32, "num_hidden_layers": 4, "sliding_window": 16,
        "sliding_window_pattern": 2, "layer_types": ["sliding_attention", "full_attention"] * 2,
        "query_pre_attn_scalar": 32, "tie_word_embeddings": True,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    },
}  # fmt: skip


def write_model(kind: str, folder: Path, **changes: object) -> None:
    """Save transformers' model of a kind with its tokenizer; its norms and biases are random too."""
    from transformers import AutoConfig, AutoModelForCausalLM

    values = {"bos_token_id": 0, "eos_token_id": 0, **MODELS[kind], **changes}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() < 2 or "bias" in name:
                parameter += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    save_tokenizer(byte_level_bpe(), folder)
