"""Every option of ModelConfig does what it says, and says so when it cannot."""

import json

import pytest
import torch
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration

from genai_pl.errors import ConfigError
from genai_pl.models import Model, ModelConfig, build_model

SIZES = {"n_layer": 2, "n_head": 4, "n_embd": 32, "vocab_size": 53, "max_seq_len": 24}
ROTARY = {**SIZES, "position": "rotary"}
RELATIVE = {**SIZES, "position": "relative", "relative_buckets": 8}
BOTH = {**SIZES, "shape": "encoder_decoder"}
ENCODER = {**SIZES, "shape": "encoder"}
WINDOW = {**ROTARY, "window": 3}
EXPERTS = {**ROTARY, "n_experts": 4, "experts_per_token": 2}
SCORE = {**ENCODER, "head": "score", "tie_embeddings": False}

# option -> (the rest, another value)
CLAMPED = {**SIZES, "gated_mlp": True, "activation": "clamped_swiglu"}
CHANGE_PARAMETERS = {
    "n_layer": (SIZES, 3),
    "n_kv_head": (SIZES, 2),
    "n_embd": (SIZES, 64),
    "head_dim": (SIZES, 16),
    "intermediate_size": (SIZES, 40),
    "vocab_size": (SIZES, 54),
    "max_seq_len": (SIZES, 25),
    "position_offset": (SIZES, 2),
    "position": (SIZES, "rotary"),
    "norm": (SIZES, "rmsnorm"),
    "norm_order": (SIZES, "post"),
    "gated_mlp": (SIZES, True),
    "bias": (SIZES, False),
    "qkv_bias": (SIZES, False),
    "qk_norm": (SIZES, True),
    "tie_embeddings": (SIZES, False),
    "n_decoder_layer": (BOTH, 3),
    "embedding_size": ({**SIZES, "head": "transform"}, 16),
    "n_token_types": (SIZES, 2),
    "share_layers": (ENCODER, True),
    "relative_buckets": (RELATIVE, 16),
    "embed_norm": (SIZES, True),
    "o_bias": (SIZES, False),
    "head": (SIZES, "transform"),
    "head_bias": (SIZES, True),
    "qk_norm_joint": ({**SIZES, "qk_norm": True}, True),
    "n_experts": (EXPERTS, 3),
    "n_shared_experts": (EXPERTS, 1),
    "router_bias": (EXPERTS, True),
    "attention_sinks": (SIZES, True),
    "expert_size": (EXPERTS, 40),
    "expert_every": (EXPERTS, 2),
    "n_dense_layers": (EXPERTS, 1),
    "n_labels": (SCORE, 3),
    "score_dense": (SCORE, True),
    "score_transform": (SCORE, True),
    "transform_bias": ({**SIZES, "head": "transform"}, False),
    "first_norm": (SIZES, False),
    "linformer_rank": ({**ENCODER, "attention_kind": "linformer"}, 8),
}
CHANGE_LOGITS = {
    "n_head": (SIZES, 2),
    "experts_per_token": (EXPERTS, 3),
    "router": (EXPERTS, "sigmoid"),
    "router_scale": (EXPERTS, 3.0),
    "normalize_top_k": (EXPERTS, False),
    "rope_theta": (ROTARY, 50.0),
    "norm_eps": (SIZES, 0.1),
    "activation": (SIZES, "relu2"),
    "swiglu_alpha": (CLAMPED, 0.5),
    "swiglu_limit": (CLAMPED, 0.1),
    "window": (SIZES, 3),
    "softcap": (SIZES, 1.0),
    "logit_softcap": (SIZES, 1.0),
    "dropout": (SIZES, 0.5),
    "shape": (SIZES, "encoder"),
    "rope_theta_local": (WINDOW, 50.0),
    "rope_scaling": (ROTARY, {"kind": "linear", "factor": 4.0}),
    "relative_max_distance": (RELATIVE, 8),
    "scale_embeddings": (SIZES, True),
    "scale_head": (SIZES, True),
    "attention_scale": (SIZES, 1.0),
    "full_every": (WINDOW, 2),
    "first_full": ({**WINDOW, "full_every": 2}, 0),
    "attention_kind": (SIZES, "performer"),
    "n_global": ({**WINDOW, "attention_kind": "window"}, 2),
    "reformer_hashes": ({**ENCODER, "attention_kind": "reformer", "reformer_bucket": 4, "reformer_hashes": 1}, 3),
    "reformer_bucket": ({**ENCODER, "attention_kind": "reformer", "reformer_bucket": 4}, 8),
}
CHANGE_BUFFERS = {
    "performer_features": ({**SIZES, "attention_kind": "performer"}, 32),
    "balance_bias": (EXPERTS, 0.1),  # the step of a bias that begins at 0
}
CHANGE_NEITHER = {
    "attention": (SIZES, "reference"),
    "eos_token_ids": (SIZES, (1, 2)),
    "extra": (SIZES, {"_name_or_path": "elsewhere"}),
    "pooler": ({**SIZES, "shape": "encoder"}, True),
    "decoder_start_token_id": (SIZES, 3),
    "score_mean": (ENCODER, True),  # it is of head=score
    "balance_loss": (EXPERTS, 0.5),
    "router_z_loss": (EXPERTS, 0.5),
}
CHANGE_INITIAL_WEIGHTS = {"init_std": (SIZES, 0.1)}


def build(values: dict) -> Model:
    torch.manual_seed(0)
    return build_model(ModelConfig(**{"init_std": 0.3, **values}))


def shapes(model: Model) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def logits(model: Model) -> Tensor:
    return model(torch.arange(12)[None])


@pytest.mark.parametrize(("option", "case"), CHANGE_PARAMETERS.items(), ids=CHANGE_PARAMETERS)
def test_options_of_the_architecture_change_the_parameters(option: str, case: tuple[dict, object]):
    rest, value = case
    assert shapes(build(rest)) != shapes(build({**rest, option: value}))


@pytest.mark.parametrize(("option", "case"), CHANGE_LOGITS.items(), ids=CHANGE_LOGITS)
def test_options_of_the_arithmetic_change_the_logits_of_the_same_weights(option: str, case: tuple[dict, object]):
    rest, value = case
    model, other = build(rest), build({**rest, option: value})
    other.load_state_dict(model.state_dict(), strict=option != "attention_kind")  # Performer's features are kept
    assert (logits(model) - logits(other)).abs().max() > 1e-2


@pytest.mark.parametrize("option", CHANGE_NEITHER)
def test_what_says_how_to_run_or_write_a_model_changes_no_logits(option: str):
    rest, value = CHANGE_NEITHER[option]
    torch.testing.assert_close(logits(build(rest)), logits(build({**rest, option: value})))


def test_more_features_make_another_performer():
    rest, value = CHANGE_BUFFERS["performer_features"]
    assert (logits(build(rest)) - logits(build({**rest, "performer_features": value}))).abs().max() > 1e-3


def test_init_std_scales_the_initial_weights():
    small, large = build({**SIZES, "init_std": 0.02}), build({**SIZES, "init_std": 0.2})
    torch.testing.assert_close(large.embed.weight, 10 * small.embed.weight)


def test_embeddings_of_t5_begin_as_in_transformers():
    theirs = T5ForConditionalGeneration(T5Config(vocab_size=97, d_model=32, d_ff=32, num_layers=1, num_heads=4))
    ours = build({**SIZES, "scale_head": True, "init_std": 0.02})
    assert ours.embed.weight.detach().std().item() == pytest.approx(
        theirs.shared.weight.detach().std().item(), rel=0.05
    )


def test_every_option_is_tested_here():
    tested = [*CHANGE_PARAMETERS, *CHANGE_LOGITS, *CHANGE_NEITHER, *CHANGE_BUFFERS, *CHANGE_INITIAL_WEIGHTS]
    assert sorted(tested) == sorted(ModelConfig.__dataclass_fields__)


@pytest.mark.parametrize(
    ("values", "derived"),
    [
        ({}, {"n_kv_head": 12, "head_dim": 64, "intermediate_size": 3072, "qkv_bias": True}),
        ({"gated_mlp": True}, {"intermediate_size": 2048}),  # 8/3 of 768
        ({"gated_mlp": True, "n_embd": 576, "n_head": 9}, {"intermediate_size": 1536, "head_dim": 64}),  # SmolLM-135M
        ({"gated_mlp": True, "n_embd": 100, "n_head": 4}, {"intermediate_size": 288}),
        ({"bias": False}, {"qkv_bias": False, "o_bias": False}),
        ({"shape": "encoder_decoder", "n_layer": 3}, {"n_decoder_layer": 3, "embedding_size": 768}),
        ({"bias": False, "qkv_bias": True}, {"qkv_bias": True}),
    ],
)
def test_sizes_left_out_are_derived(values: dict, derived: dict):
    config = ModelConfig(**values)
    assert {name: getattr(config, name) for name in derived} == derived


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n_embd": 30, "n_head": 4}, r"model.n_embd \(30\) must be divisible by model.n_head \(4\).*model.head_dim"),
        ({"n_head": 4, "n_kv_head": 3}, r"model.n_head \(4\) must be a multiple of model.n_kv_head \(3\)"),
        ({"n_head": 0}, "model.n_head must be a number above 0, not 0"),
        ({"n_kv_head": 0}, "model.n_kv_head must be a number above 0"),
        ({"n_layer": -1}, "model.n_layer must be a number above 0, not -1"),
        ({"n_embd": "64"}, "model.n_embd must be a number above 0, not '64'"),
        ({"vocab_size": 0}, "model.vocab_size"),
        ({"max_seq_len": 0}, "model.max_seq_len"),
        ({"window": 0}, "model.window"),
        ({"softcap": 0.0}, "model.softcap"),
        ({"logit_softcap": -1.0}, "model.logit_softcap"),
        ({"rope_theta": 0.0}, "model.rope_theta"),
        ({"norm_eps": 0.0}, "model.norm_eps"),
        ({"init_std": 0.0}, "model.init_std"),
        ({"dropout": 1.0}, r"model.dropout must be in \[0, 1\), not 1.0"),
        ({"dropout": -0.1}, "model.dropout"),
        ({"position": "rotary", "head_dim": 7}, r"model.head_dim \(7\) must be even for model.position=rotary"),
        ({"position": "rotray"}, "model.position=rotray is not one of learned, sinusoidal, rotary, alibi"),
        ({"activation": "swiglu"}, "model.activation=swiglu is not one of relu, relu2, gelu"),
        ({"attention": "sdpa", "softcap": 5.0}, "model.attention=sdpa has no softcap"),
        ({"position": "xl"}, "model.position=xl needs model.shape=encoder"),
        ({"n_decoder_layer": 2}, "model.n_decoder_layer needs model.shape=encoder_decoder"),
        ({"share_layers": True}, "model.share_layers needs model.shape=encoder"),
        ({"attention_kind": "linformer"}, "model.attention_kind=linformer .* needs model.shape=encoder"),
        ({"attention_kind": "reformer", "n_kv_head": 4}, "model.attention_kind=reformer .* model.n_kv_head=null"),
        ({"attention_kind": "window"}, "model.attention_kind=window needs model.window"),
        ({"full_every": 2}, "model.full_every needs model.window"),
        ({"embedding_size": 16}, "model.embedding_size below n_embd needs model.head=transform"),
        (
            {"rope_scaling": {"kind": "dynamic"}},
            "model.rope_scaling.kind=dynamic is not one of none, linear, llama3, yarn",
        ),
        ({"rope_scaling": {"factor": 0.5}}, "model.rope_scaling.factor must be at least 1, not 0.5"),
    ],
)
def test_what_cannot_work_is_an_error_that_names_the_option(values: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        ModelConfig(**values)


def test_a_configuration_makes_a_round_trip_through_json():
    config = ModelConfig(
        n_kv_head=4,
        position="alibi",
        norm="rmsnorm",
        norm_order="post",
        activation="relu2",
        window=7,
        rope_scaling={"factor": 2.0},
    )
    again = ModelConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert again.position is config.position
    assert set(config.to_dict()) == set(ModelConfig.__dataclass_fields__)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n_layers": 2}, "unknown model field 'n_layers'"),
        ({"n_layer": [2]}, "model.n_layer"),
        ({"dropout": "x"}, "model.dropout must be a number, not 'x'"),
    ],
)
def test_a_foreign_dictionary_is_an_error(values: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_dict(values)
