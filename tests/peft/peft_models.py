"""Small models of every shape, and helpers that several PEFT tests share."""

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from genai_pl.models import ModelConfig, WrappedDecoder, build_model
from genai_pl.models.hf.transformers_model import build_wrapped

SIZES = {"n_layer": 2, "n_head": 4, "n_embd": 32, "vocab_size": 61, "max_seq_len": 24}
MODERN = {**SIZES, "position": "rotary", "norm": "rmsnorm", "activation": "silu", "gated_mlp": True, "bias": False}
SHAPES = {
    "gpt2": SIZES,
    "llama": {**MODERN, "n_kv_head": 2, "tie_embeddings": False},
    "qwen2": {**MODERN, "n_kv_head": 2, "qkv_bias": True},
    "qwen3": {**MODERN, "n_kv_head": 2, "qk_norm": True},
    "gemma3": {
        **MODERN, "activation": "gelu_tanh", "norm_order": "sandwich", "qk_norm": True, "scale_embeddings": True,
        "window": 5, "full_every": 2, "rope_theta_local": 50.0,
    },
    "roberta": {
        **SIZES, "shape": "encoder", "norm_order": "post", "embed_norm": True, "n_token_types": 1, "activation": "gelu",
        "head": "transform", "head_bias": True, "max_seq_len": 22,
    },
    "bert": {
        **SIZES, "shape": "encoder", "norm_order": "post", "embed_norm": True, "n_token_types": 2, "activation": "gelu",
        "head": "transform", "head_bias": True,
    },
    "albert": {
        **SIZES, "shape": "encoder", "norm_order": "post", "embed_norm": True, "n_token_types": 2, "share_layers": True,
        "head": "transform", "head_bias": True, "embedding_size": 16,
    },
    "xlnet": {**SIZES, "shape": "encoder", "position": "xl", "norm_order": "post", "qkv_bias": False, "o_bias": False},
    "t5": {
        **SIZES, "shape": "encoder_decoder", "position": "relative", "norm": "rmsnorm", "bias": False,
        "activation": "relu", "attention_scale": 1.0, "scale_head": True,
    },
    "reformer": {**SIZES, "attention_kind": "reformer"},
}  # fmt: skip
WRAPPED = {
    "model_type": "olmo2",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "vocab_size": 61,
    "max_position_embeddings": 24,
    "pad_token_id": 0,
}
KINDS = ("gpt2", "llama", "gemma3", "bert", "albert", "xlnet", "t5", "reformer", "wrapped")


def shaken(model: nn.Module, *, of: str = "", std: float = 0.2, seed: int = 0) -> nn.Module:
    """The model in evaluation mode with new random values in every parameter, or every trained one."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if of != "trained" or parameter.requires_grad:
            centre = 1.0 if any(part in name for part in ("norm", "ln_", "magnitude", "scale", "ia3")) else 0.0
            drawn = torch.empty(parameter.shape).normal_(centre, std, generator=generator)
            parameter.data.copy_(drawn)
    return model.eval()


def build(kind: str) -> nn.Module:
    """A small model with random weights of visible size."""
    if kind == "wrapped":
        return shaken(build_wrapped(WRAPPED))
    return shaken(build_model(ModelConfig(**SHAPES[kind])))


def theirs_of(model: WrappedDecoder) -> nn.Module:
    """The transformers model with the weights of a wrapped one."""
    values = dict(WRAPPED)
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(values.pop("model_type"), **values))
    theirs.load_state_dict(model.inner.state_dict())
    return theirs.eval()


def tokens(rows: int = 2) -> Tensor:
    return torch.randint(3, 61, (rows, 17), generator=torch.Generator().manual_seed(1))


def logits(model: nn.Module, input_ids: Tensor | None = None) -> Tensor:
    """The logits of a model; an encoder-decoder gets the tokens in reverse as its source."""
    input_ids = tokens() if input_ids is None else input_ids
    if model.config.shape.value == "encoder_decoder":
        return model(input_ids.flip(1), decoder_input_ids=input_ids)
    return model(input_ids)


def logits_of(model: nn.Module, input_ids: Tensor | None = None) -> Tensor:
    """The logits without a graph: kernels depend on whether gradients are needed, and round differently."""
    with torch.no_grad():
        return logits(model, input_ids)


def train(model: nn.Module, steps: int = 3) -> list[float]:
    """Train some steps on the same rows; returns the losses."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(steps):
        loss = nn.functional.cross_entropy(logits(model).flatten(0, 1), tokens().flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def frozen(model: nn.Module) -> list[Tensor]:
    """A copy of all parameters that are not trained."""
    return [p.detach().clone() for p in model.parameters() if not p.requires_grad]
