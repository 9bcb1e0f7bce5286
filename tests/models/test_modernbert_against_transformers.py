"""ModernBERT gives the logits and gradients of transformers' own attention, from the same folder and back."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_against_transformers import TOKENS, edit, shaken
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from genai_pl.errors import CheckpointError
from genai_pl.models import load_pretrained, save_pretrained
from genai_pl.models.pooling import label_scores

SIZES = {
    "hidden_size": 32, "num_hidden_layers": 5, "num_attention_heads": 4, "intermediate_size": 40, "vocab_size": 61,
    "max_position_embeddings": 32, "local_attention": 6, "pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ROPES = {
    "full_attention": {"rope_type": "default", "rope_theta": 500.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
}
KINDS = {
    "base": {},
    "biases": {"mlp_bias": True, "norm_bias": True, "attention_bias": True, "classifier_bias": True},
    "every_second": {"global_attn_every_n_layers": 2, "rope_parameters": ROPES, "tie_word_embeddings": False},
    "all_full": {"layer_types": ["full_attention"] * 5, "rope_parameters": ROPES},
    "none_full": {"layer_types": ["sliding_attention"] * 5},
    "second_full": {"layer_types": ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"]},
    "silu": {"hidden_activation": "silu", "classifier_activation": "silu"},
}
CLASSES = {"heads": (AutoModelForMaskedLM, "ModernBertForMaskedLM"), "none": (AutoModel, "ModernBertModel")}


def build_theirs(auto: type, **values: object) -> nn.Module:
    config = AutoConfig.for_model("modernbert", **{**SIZES, **values})
    return shaken(auto.from_config(config, attn_implementation="eager")).double()


def close(ours: Tensor, theirs: Tensor) -> None:
    # transformers turns queries and keys in float32 whatever the weights are
    torch.testing.assert_close(ours, theirs, rtol=0, atol=3e-6)


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, 61, (2, 19), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def padded() -> Tensor:
    mask = torch.ones(2, 19, dtype=torch.long)
    mask[1, 12:] = 0
    return mask


def alone(model: nn.Module, ids: Tensor, mask: Tensor) -> list[Tensor]:
    """Logits of each row without its padding: in float64 transformers' mask overflows where a query sees padding only."""
    return [model(row[seen > 0][None]).logits[0] for row, seen in zip(ids, mask, strict=True)]


@pytest.mark.parametrize("kind", KINDS)
def test_masked_language_models_give_the_logits_of_transformers_both_ways(
    kind: str, tmp_path: Path, ids: Tensor, padded: Tensor
) -> None:
    theirs = build_theirs(AutoModelForMaskedLM, **KINDS[kind])
    theirs.save_pretrained(tmp_path)
    ours = load_pretrained(tmp_path, dtype=torch.float64)
    with torch.no_grad():
        expected = torch.cat(alone(theirs, ids, padded))
        close(ours(ids, padded)[padded > 0], expected)
        assert save_pretrained(ours, tmp_path / "again", token_ids=TOKENS) == "ModernBertForMaskedLM"
        again = AutoModelForMaskedLM.from_pretrained(tmp_path / "again", attn_implementation="eager")
        assert type(again) is type(theirs)
        close(torch.cat(alone(again, ids, padded)), expected)
    read, saved = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path, tmp_path / "again"))
    assert read["layer_types"] == saved["layer_types"]


def test_gradients_are_those_of_transformers(tmp_path: Path, ids: Tensor) -> None:
    theirs = build_theirs(AutoModelForMaskedLM)
    theirs.save_pretrained(tmp_path)
    ours = load_pretrained(tmp_path, dtype=torch.float64)
    labels = ids.roll(1, 1)
    for logits in (ours(ids), theirs(ids).logits):
        F.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    gradients = dict(theirs.named_parameters())
    layer, theirs_layer = ours.blocks[1], "model.layers.1"
    qkv = [getattr(layer.attention, f"{p}_proj").weight.grad for p in "qkv"]
    mlp = [layer.mlp.gate_proj.weight.grad, layer.mlp.up_proj.weight.grad]
    pairs = {
        "model.embeddings.tok_embeddings.weight": ours.embed.weight.grad,
        f"{theirs_layer}.attn.Wqkv.weight": torch.cat(qkv),
        f"{theirs_layer}.attn_norm.weight": layer.norm1.weight.grad,
        f"{theirs_layer}.mlp.Wi.weight": torch.cat(mlp),
        "head.dense.weight": ours.transform.dense.weight.grad,
        "decoder.bias": ours.lm_head.bias.grad,
    }
    for name, gradient in pairs.items():
        close(gradient, gradients[name].grad)


@torch.no_grad()
def test_packed_documents_are_read_as_alone(tmp_path: Path, ids: Tensor) -> None:
    theirs = build_theirs(AutoModelForMaskedLM)
    theirs.save_pretrained(tmp_path)
    ours = load_pretrained(tmp_path, dtype=torch.float64)
    row = torch.cat([ids[0], ids[1, :12]])[None]
    segments = torch.tensor([[1] * 19 + [2] * 12])
    close(ours(row, segments)[0], torch.cat(alone(theirs, ids, torch.tensor([[1] * 19, [1] * 12 + [0] * 7]))))


@torch.no_grad()
def test_a_model_without_head_gives_the_states_of_transformers_both_ways(tmp_path: Path, ids: Tensor) -> None:
    theirs = build_theirs(AutoModel)
    theirs.save_pretrained(tmp_path)
    ours = load_pretrained(tmp_path, dtype=torch.float64)
    expected = theirs(ids).last_hidden_state
    close(ours.features(ids), expected)
    save_pretrained(ours, tmp_path / "again", token_ids=TOKENS)
    again = AutoModel.from_pretrained(tmp_path / "again", attn_implementation="eager")
    close(again(ids).last_hidden_state, expected)


@torch.no_grad()
@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("auto", [AutoModelForSequenceClassification, AutoModelForTokenClassification])
def test_heads_for_labels_give_the_logits_of_transformers_both_ways(
    auto: type, pooling: str, tmp_path: Path, ids: Tensor, padded: Tensor
) -> None:
    names = {"id2label": {0: "bad", 1: "fair", 2: "good"}, "label2id": {"bad": 0, "fair": 1, "good": 2}}
    theirs = build_theirs(auto, classifier_pooling=pooling, **names)
    theirs.save_pretrained(tmp_path)
    ours = load_pretrained(tmp_path, dtype=torch.float64)
    of_texts = auto is AutoModelForSequenceClassification
    join = torch.stack if of_texts else torch.cat
    expected = join(alone(theirs, ids, padded))
    found = label_scores(ours, ids, padded, 1)[:, 0] if of_texts else ours.label_logits(ours.features(ids, padded))
    close(found.double() if of_texts else found[padded > 0], expected)
    save_pretrained(ours, tmp_path / "again", token_ids=TOKENS)
    again = auto.from_pretrained(tmp_path / "again", attn_implementation="eager")
    close(join(alone(again, ids, padded)), expected)
    assert again.config.classifier_pooling == pooling


def test_older_configurations_with_a_period_and_two_bases_are_read(tmp_path: Path, ids: Tensor) -> None:
    theirs = build_theirs(AutoModelForMaskedLM, rope_parameters=ROPES)
    theirs.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    for key in ("layer_types", "rope_parameters"):
        del values[key]
    older = {"global_attn_every_n_layers": 3, "global_rope_theta": 500.0, "local_rope_theta": 20.0}
    (tmp_path / "config.json").write_text(json.dumps({**values, **older, "reference_compile": None}))
    with torch.no_grad():
        close(load_pretrained(tmp_path, dtype=torch.float64)(ids), theirs(ids).logits)


@pytest.mark.parametrize(
    "changed",
    [{"mlp_bias": True}, {"decoder_bias": False}, {"classifier_pooling": "max"}, {"classifier_activation": "silu"},
     {"layer_types": ["full_attention"] * 2 + ["sliding_attention"] * 3},
     {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}],
)  # fmt: skip
def test_other_arithmetic_is_refused_by_name(changed: dict, tmp_path: Path) -> None:
    build_theirs(AutoModelForMaskedLM).save_pretrained(tmp_path)
    edit(tmp_path / "config.json", **changed)
    with pytest.raises(CheckpointError, match=next(iter(changed)).removesuffix("_scaling").replace("rope", "rotary")):
        load_pretrained(tmp_path)
