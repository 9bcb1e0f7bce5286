"""Families with experts: the logits of transformers in both directions, and the per-expert files that it writes itself."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from test_against_transformers import LLAMA, MODERN, NATIVE, TOKENS, build_ours, build_theirs
from torch import Tensor
from transformers import AutoModelForCausalLM

from genai_pl.errors import CheckpointError
from genai_pl.models import load_pretrained, save_pretrained
from genai_pl.models.hf.config import family_of
from genai_pl.models.hf.folder import read_json, write_json

QWEN3_MOE = {
    **LLAMA,
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}
OLMOE = {key: value for key, value in LLAMA.items() if key != "head_dim"}
OLMOE |= {"model_type": "olmoe", "num_experts": 4, "num_experts_per_tok": 2, "pad_token_id": 0}
DOTS1 = {key: value for key, value in LLAMA.items() if key != "head_dim"} | {
    "model_type": "dots1",
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "n_shared_experts": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "sliding_window": None,
}
THEIRS = {
    "mixtral": {**LLAMA, "model_type": "mixtral", "num_local_experts": 4},
    "mixtral_window": {**LLAMA, "model_type": "mixtral", "num_local_experts": 3, "sliding_window": 5},
    "qwen3_moe": QWEN3_MOE,
    "qwen3_moe_some_layers": {
        **QWEN3_MOE,
        "num_hidden_layers": 5,
        "decoder_sparse_step": 2,
        "mlp_only_layers": [0, 1],
        "norm_topk_prob": True,
    },
    "olmoe": OLMOE,
    "olmoe_normalized": {**OLMOE, "norm_topk_prob": True, "tie_word_embeddings": True},
    "dots1": DOTS1,
}
EXPERTS = {**MODERN, "n_experts": 4, "expert_size": 24}
OURS = {
    "MixtralForCausalLM": {**EXPERTS, "n_kv_head": 2},
    "Qwen3MoeForCausalLM": {**EXPERTS, "qk_norm": True, "expert_every": 2, "balance_loss": 0.5},
    "OlmoeForCausalLM": {**EXPERTS, "qk_norm": True, "qk_norm_joint": True, "normalize_top_k": False},
    "Dots1ForCausalLM": {
        **EXPERTS,
        "qk_norm": True,
        "router": "sigmoid",
        "balance_bias": 0.01,
        "n_shared_experts": 1,
        "n_dense_layers": 1,
    },
}
NATIVES = {
    "shared experts of softmax": {**EXPERTS, "n_shared_experts": 1},
    "GPT-2 with experts": {**NATIVE["gpt2_with_grouped_keys"], "n_experts": 3, "balance_bias": 0.1},
    "a window with experts and qk_norm": {**EXPERTS, "qk_norm": True, "window": 5},
}


@pytest.fixture
def input_ids() -> Tensor:
    return torch.randint(61, (2, 17), generator=torch.Generator().manual_seed(1))


def with_biases(model: torch.nn.Module) -> torch.nn.Module:
    """The model with drawn balance biases: zeros would hide a mistake."""
    for name, buffer in model.named_buffers():
        if name.endswith(("balance_bias", "e_score_correction_bias")):
            buffer.normal_(std=0.3, generator=torch.Generator().manual_seed(2))
    return model


def names_and_shapes(folder: Path) -> dict[str, list[int]]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118


@torch.no_grad()
@pytest.mark.parametrize("values", THEIRS.values(), ids=THEIRS)
def test_models_of_transformers_are_read_and_written_exactly(values: dict, tmp_path: Path, input_ids: Tensor) -> None:
    theirs = with_biases(build_theirs(values))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_pretrained(tmp_path / "theirs")
    torch.testing.assert_close(ours(input_ids), theirs(input_ids).logits, rtol=0, atol=1e-5)
    class_name = save_pretrained(ours, tmp_path / "ours", token_ids=TOKENS)
    assert class_name == type(theirs).__name__
    assert names_and_shapes(tmp_path / "ours") == names_and_shapes(tmp_path / "theirs")  # as others read them
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    torch.testing.assert_close(again(input_ids).logits, theirs(input_ids).logits, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("class_name", "values"), OURS.items(), ids=OURS)
def test_models_of_ours_are_read_by_transformers(class_name: str, values: dict, tmp_path: Path, input_ids: Tensor):
    ours = with_biases(build_ours(values))
    assert save_pretrained(ours, tmp_path, token_ids=TOKENS) == class_name
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(theirs(input_ids).logits, ours(input_ids), rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("values", NATIVES.values(), ids=NATIVES)
def test_models_that_no_class_expresses_come_back_equal(values: dict, tmp_path: Path, input_ids: Tensor) -> None:
    ours = with_biases(build_ours(values))
    assert family_of(ours.config) is None
    save_pretrained(ours, tmp_path, token_ids=TOKENS)
    assert torch.equal(load_pretrained(tmp_path)(input_ids), ours(input_ids))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("qwen3_moe_some_layers", {"mlp_only_layers": [3]}),
        ("olmoe", {"clip_qkv": 8.0}),
        ("olmoe", {"head_dim": 4}),
        ("dots1", {"n_group": 2}),
        ("dots1", {"layer_types": ["sliding_attention", "full_attention"]}),
        ("mixtral", {"num_local_experts": 5}),
    ],
)
def test_what_is_not_computed_is_refused_with_its_key(name: str, change: dict, tmp_path: Path) -> None:
    build_theirs(THEIRS[name]).save_pretrained(tmp_path)
    write_json(tmp_path / "config.json", read_json(tmp_path / "config.json") | change)
    with pytest.raises(CheckpointError, match=next(iter(change)) if "num" not in next(iter(change)) else "experts.4"):
        load_pretrained(tmp_path)
