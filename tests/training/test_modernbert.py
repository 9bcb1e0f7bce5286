"""ModernBERT in every objective of encoders: trained from nothing or from a folder, and read by transformers as it is here."""

import json
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from genai_pl import load
from genai_pl.models.pooling import label_scores
from tests.conftest import TINY

NANO = ("model=modernbert_nano", "model.n_layer=4", "model.window=4", *TINY[1:])
LATER = [word for word in TINY if not word.startswith(("model.", "tokenizer"))]
ROWS = {
    "classify": [{"text": f"a {word} film {n}", "label": word} for n in range(8) for word in ("good", "bad")],
    "rerank": [{"query": f"{n}", "documents": [f"is {n}", "no"], "labels": [1, 0]} for n in range(12)],
    "token_classify": [{"tokens": ["Ada", "wrote", str(n)], "tags": ["B-PER", "O", "O"]} for n in range(12)],
    "contrastive": [{"anchor": f"question {n}", "positive": f"answer {n}"} for n in range(12)],
}
AUTO = {
    "classify": AutoModelForSequenceClassification,
    "rerank": AutoModelForSequenceClassification,
    "token_classify": AutoModelForTokenClassification,
    "contrastive": AutoModel,
}


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


@pytest.fixture
def pretrained(command, tmp_path: Path) -> Path:
    """A run of objective=mlm, whose rows are packed documents."""
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": f"line {n}"}) + "\n" for n in range(300)))
    result = command("train", "objective=mlm", *NANO, "data.path=text.jsonl", "hydra.run.dir=mlm")
    assert result.status == 0, result.err
    return tmp_path / "mlm"


@torch.no_grad()
def test_a_masked_language_model_is_pretrained_and_exported(pretrained: Path) -> None:
    theirs = AutoModelForMaskedLM.from_pretrained(pretrained / "model", attn_implementation="eager").eval()
    assert type(theirs).__name__ == "ModernBertForMaskedLM"
    assert theirs.config.layer_types == ["full_attention", *["sliding_attention"] * 2, "full_attention"]
    ids = torch.arange(5, 25)[None]
    close(load(str(pretrained)).model(ids), theirs(ids).logits)


@torch.no_grad()
@pytest.mark.parametrize(
    "objective",
    ["classify", *(pytest.param(name, marks=pytest.mark.slow) for name in ("rerank", "token_classify", "contrastive"))],
)
def test_a_pretrained_one_learns_labels_and_vectors(objective: str, pretrained: Path, command, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[objective]))
    options = (f"objective={objective}", "init_from=mlm", "data.path=rows.jsonl", *LATER, "hydra.run.dir=run")
    result = command("train", *options)
    assert result.status == 0, result.err
    model = load("run").model
    theirs = AUTO[objective].from_pretrained(tmp_path / "run" / "model", attn_implementation="eager").eval()
    ids, ones = torch.arange(5, 25)[None], torch.ones(1, 20, dtype=torch.long)
    if objective == "contrastive":
        close(model.features(ids), theirs(ids).last_hidden_state)
    elif objective == "token_classify":
        close(model.label_logits(model.features(ids)), theirs(ids).logits)
    else:
        close(label_scores(model, ids, ones, 1)[:, 0], theirs(ids).logits)
