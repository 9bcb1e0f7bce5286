"""Every causal language model that transformers registers, with random weights and small enough to run in seconds."""

from dataclasses import fields

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY = 64
WINDOW = 5
SIZES = {
    32: """hidden_size d_model n_embd dim embed_dim emb_dim word_embed_proj_dim embedding_size input_embedding_size
        output_embedding_size attention_hidden_size lru_width mamba_d_ssm backbone_hidden_size embedding_dim
        vision_embedding_dim""",
    48: """intermediate_size ffn_dim n_inner dim_ff dff d_inner ffn_hidden_size decoder_ffn_dim encoder_ffn_dim
        intermediate_size_mlp dense_intermediate_size feed_forward_size prefix_dense_intermediate_size""",
    24: """moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size expert_ffn_hidden_size
        shared_experts_intermediate_size moe_shared_expert_intermediate_size""",
    4: """num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads encoder_attention_heads
        num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads linear_num_heads
        mamba_n_heads index_n_heads indexer_n_heads num_experts n_routed_experts num_local_experts moe_num_experts
        mamba_chunk_size chunk_size index_topk attn_head_count""",
    2: """num_key_value_heads num_kv_heads swa_num_key_value_heads num_experts_per_tok moe_topk moe_k top_k_experts
        num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_encoder_layers
        num_decoder_layers linear_num_key_heads linear_num_value_heads mamba_n_groups n_groups zero_expert_num
        mamba_num_heads num_blocks indexer_kv_heads num_codebooks""",
    1: "n_group topk_group first_k_dense_replace n_shared_experts num_shared_experts moe_num_shared_experts",
    8: """head_dim qk_nope_head_dim v_head_dim qk_rope_head_dim index_head_dim linear_key_head_dim linear_value_head_dim
        linear_head_dim swa_head_dim indexer_head_dim kv_channels dim_head d_rel mamba_d_state state_size
        ssm_state_size gated_norm_rank hc_lowrank router_hidden_size pronunciation_embed_dim shape_embed_dim
        hidden_size_per_layer_input laurel_rank adapter_rank""",
    16: "q_lora_rank kv_lora_rank o_lora_rank moe_latent_size mamba_head_dim",
    WINDOW: """sliding_window sliding_window_size window_size local_attention attention_window_size
        attention_chunk_size keep_window_size""",
    VOCABULARY: """max_position_embeddings n_positions n_ctx max_seq_len context_length max_target_positions
        max_source_positions""",
    VOCABULARY + 0.0: """vocab_size vocab_size_per_layer_input decoder_vocab_size unpadded_vocab_size
        pronunciation_vocab_size shape_vocab_size audio_vocab_size""",
    0: "pad_token_id num_mtp_layers num_nextn_predict_layers",
}
TABLE = {name: int(size) for size, names in SIZES.items() for name in names.split()}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "forced_eos_token_id": None}
DROPOUTS = ("dropout", "drop", "dropout_prob")
MLA = "kv_lora_rank"  # attention over latents, which has as many keys as queries
INDEXER = {"indexer_kv_heads": 1, "indexer_budget": 4, "indexer_compress_ratio": 2}
# what a family needs beside the table: sizes that hang on each other, or layers of every kind among few
FAMILIES: dict[str, dict[str, object]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "codegen": {"rotary_dim": 4},
    "gptj": {"rotary_dim": 4},
    "fuyu": {"text_config": {"model_type": "persimmon"}},
    "cohere_compass_text": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 500.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        }
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 48},
    },
    "gemma3": {"vision_config": {"model_type": "siglip_vision_model", "image_size": 28}, "mm_tokens_per_image": 4},
    "gemma3n_text": {"num_kv_shared_layers": 2},
    "gemma4_unified": {"vision_config": {"mm_embed_dim": 32, "mm_posemb_size": 8, "output_proj_dims": 32}},
    "moss_transcribe_diarize": {"text_config": {"model_type": "qwen3"}},
    "qwen4_exp_text": INDEXER,
    "qwen4_exp": {"text_config": INDEXER},
    "xlstm": {"num_heads": 2},
    "got_ocr2": {"text_config": {"model_type": "qwen2"}},
    "granitemoehybrid": {"layer_types": ["full_attention", "linear_attention"]},
    "lfm2": {"layer_types": ["full_attention", "conv"]},
    "lfm2_moe": {"layer_types": ["full_attention", "conv"]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_hidden_layers": 4},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "is_decoder": True,
        "attention_head_size": 8,
        "axial_pos_shape": (8, 8),
        "axial_pos_embds_dim": (8, 24),
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "attn_layers": ("local", "lsh"),
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 64, "num_hidden_layers": 5, "attn_layer_period": 2, "attn_layer_offset": 1},
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_config(kind: str, **values: object) -> PreTrainedConfig:
    """The configuration of a family with small sizes, no dropout, and room for 64 positions, with these values in it."""
    return small(CONFIG_MAPPING[kind], FAMILIES.get(kind, {}) | values)


def small(kind: type[PreTrainedConfig], given: dict[str, object]) -> PreTrainedConfig:
    """A configuration of a class with small sizes, unless given otherwise, down into its parts."""
    names = [field.name for field in fields(kind)]
    values: dict[str, object] = {name: (TABLE | TOKENS)[name] for name in names if name in TABLE or name in TOKENS}
    values |= {f.name: type(f.default)(0) for f in fields(kind) if f.name.endswith(DROPOUTS) and f.default is not None}
    if MLA in names and "num_key_value_heads" in names:
        values["num_key_value_heads"] = values["num_attention_heads"]
    for name, part in kind.sub_configs.items():
        inner = dict(given.get(name, {}))
        if "model_type" in inner:
            part = CONFIG_MAPPING[inner.pop("model_type")]
        if issubclass(part, PreTrainedConfig):
            values[name] = small(part, inner).to_dict()
    values |= {name: value for name, value in given.items() if not isinstance(values.get(name), dict)}
    return kind(**values | kinds_of_layers(kind, names, values))


def kinds_of_layers(kind: type[PreTrainedConfig], names: list[str], values: dict[str, object]) -> dict[str, object]:
    """Four layers with one of each kind that the class has by default; nothing where the values state kinds."""
    if "layer_types" not in names or "layer_types" in values:
        return {}
    usual = kind().layer_types
    kinds = list(dict.fromkeys(usual or []))
    if len(kinds) < 2:
        return {}
    return {"num_hidden_layers": 4, "layer_types": (kinds * 4)[:4]}
