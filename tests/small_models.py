"""Sizes of small decoders, shared by tests of counts."""

GPT = {"n_layer": 3, "n_head": 4, "n_embd": 64, "vocab_size": 200, "max_seq_len": 32}
LLAMA = {
    **GPT,
    "position": "rotary",
    "norm": "rmsnorm",
    "activation": "silu",
    "gated_mlp": True,
    "bias": False,
    "n_kv_head": 2,
    "tie_embeddings": False,
}
MODELS = {
    "gpt2": GPT,
    "llama": LLAMA,
    "qwen3": {**LLAMA, "qk_norm": True, "head_dim": 32},
    "the seed": {**GPT, "norm_order": "post", "activation": "relu", "position": "sinusoidal"},
}
