"""Heads for labels give the logits of transformers' classes, of texts and of tokens, from the same folder and back."""

import json
from pathlib import Path

import pytest
import torch
from test_against_transformers import TOKENS, shaken
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from genai_pl.config.enums import Head
from genai_pl.config.labels import MULTI, SINGLE, Labels, read_labels
from genai_pl.models import load_pretrained, save_pretrained
from genai_pl.models.pooling import label_scores

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40, "vocab_size": 61}
ENCODER = {**SIZES, "max_position_embeddings": 24}
DECODER = {**SIZES, "num_key_value_heads": 2, "max_position_embeddings": 32}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 61, "n_positions": 32}
KINDS = {
    "bert": ENCODER,
    "roberta": {**ENCODER, "type_vocab_size": 1, "pad_token_id": 1},
    "albert": {**ENCODER, "embedding_size": 16},
    "llama": DECODER,
    "mistral": DECODER,
    "qwen2": DECODER,
    "qwen3": {**DECODER, "head_dim": 8},
    "gpt2": GPT2,
    "gemma3_text": {**DECODER, "head_dim": 8},
}
NAMES = ("bad", "fair", "good")


def build_theirs(auto: type, kind: str, **more: object) -> nn.Module:
    named = {"id2label": dict(enumerate(NAMES)), "label2id": {name: n for n, name in enumerate(NAMES)}}
    return shaken(auto.from_config(AutoConfig.for_model(kind, **KINDS[kind], **more, **named)))


@pytest.fixture
def rows() -> tuple[Tensor, Tensor]:
    """Token ids (2, 17) and their segments: the second row has 11 tokens, then the padding token 1."""
    ids = torch.randint(3, 61, (2, 17), generator=torch.Generator().manual_seed(1))
    segments = torch.ones(2, 17, dtype=torch.long)
    segments[1, 11:] = 0
    return ids.masked_fill(segments == 0, 1), segments


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_texts_are_classified_as_by_transformers_both_ways(kind: str, tmp_path: Path, rows: tuple) -> None:
    ids, segments = rows
    theirs = build_theirs(
        AutoModelForSequenceClassification, kind, **({"pad_token_id": 1} if "pad_token_id" not in KINDS[kind] else {})
    )
    theirs.save_pretrained(tmp_path)
    ours = load_pretrained(tmp_path)
    expected = theirs(ids, attention_mask=segments).logits
    close(label_scores(ours, ids, segments, 1)[:, 0], expected)
    assert read_labels(ours.config.extra, ours.config.n_labels).names == NAMES
    save_pretrained(ours, tmp_path / "again", token_ids={**TOKENS, "pad_token_id": 1})
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "again")
    assert type(again) is type(theirs)
    assert again.config.id2label == dict(enumerate(NAMES))
    close(again(ids, attention_mask=segments).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "gemma3_text"])
def test_tokens_are_classified_as_by_transformers_both_ways(kind: str, tmp_path: Path, rows: tuple) -> None:
    ids, segments = rows
    theirs = build_theirs(AutoModelForTokenClassification, kind)
    theirs.save_pretrained(tmp_path)
    ours = load_pretrained(tmp_path)
    expected = theirs(ids, attention_mask=segments).logits[segments > 0]
    close(ours.label_logits(ours.features(ids, segments))[segments > 0], expected)
    save_pretrained(ours, tmp_path / "again", token_ids=TOKENS)
    again = AutoModelForTokenClassification.from_pretrained(tmp_path / "again")
    assert type(again) is type(theirs)
    close(again(ids, attention_mask=segments).logits[segments > 0], expected)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["bert", "roberta", "llama", "gpt2"])
@pytest.mark.parametrize("head", [Head.score, Head.tokens])
def test_a_new_head_on_a_folder_is_written_as_the_class_of_transformers(
    kind: str, head: Head, tmp_path: Path, rows
) -> None:
    ids, segments = rows
    auto = AutoModel if kind in ("bert", "roberta") else AutoModelForCausalLM
    build_theirs(auto, kind).save_pretrained(tmp_path)
    ours = load_pretrained(tmp_path)
    pooler = None if ours.pooler is None else ours.pooler.weight.clone()
    ours.set_head(head, Labels(NAMES, MULTI))
    assert all((parameter == 0).all() for parameter in ours.score.parameters())
    if kind == "bert" and head is Head.score:
        assert torch.equal(ours.score_dense.weight, pooler)  # what it was pretrained as
    for parameter in ours.score.parameters():
        nn.init.normal_(parameter)
    save_pretrained(ours, tmp_path / "again", token_ids={**TOKENS, "pad_token_id": 1})
    classes = {Head.score: AutoModelForSequenceClassification, Head.tokens: AutoModelForTokenClassification}
    again = classes[head].from_pretrained(tmp_path / "again").eval()
    assert again.config.problem_type == MULTI
    logits = again(ids, attention_mask=segments).logits
    if head is Head.score:
        close(label_scores(ours, ids, segments, 1)[:, 0], logits)
    else:
        close(ours.label_logits(ours.features(ids, segments))[segments > 0], logits[segments > 0])


def test_a_head_with_these_outputs_stays_and_takes_their_names(tmp_path: Path) -> None:
    build_theirs(AutoModelForSequenceClassification, "bert").save_pretrained(tmp_path)
    ours = load_pretrained(tmp_path)
    weight = ours.score.weight
    ours.set_head(Head.score, Labels(("a", "b", "c"), SINGLE))
    assert ours.score.weight is weight
    assert ours.config.extra["id2label"] == {"0": "a", "1": "b", "2": "c"}
    ours.set_head(Head.score, Labels(("a", "b"), SINGLE))
    assert ours.score.weight.shape == (2, 32)
    ours.set_head(Head.none)
    assert (ours.score, ours.score_dense, ours.config.n_labels, ours.config.score_dense) == (None, None, 1, False)
    assert "id2label" not in ours.config.extra


def test_labels_that_config_json_does_not_name_are_numbered(tmp_path: Path) -> None:
    config = AutoConfig.for_model("llama", **DECODER, num_labels=4)
    shaken(AutoModelForSequenceClassification.from_config(config)).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    values = {k: v for k, v in json.loads(file.read_text()).items() if k not in ("id2label", "label2id")}
    file.write_text(json.dumps({**values, "num_labels": 4}))
    ours = load_pretrained(tmp_path)
    assert read_labels(ours.config.extra, ours.config.n_labels) == Labels(("LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3"))
    assert Labels(("LABEL_0",)).activation == "sigmoid"
