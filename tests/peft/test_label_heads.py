"""Heads for labels go with their adapters, in PEFT's files and here, in both directions."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft_models import shaken
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoModelForTokenClassification

from genai_pl.config.enums import Head
from genai_pl.config.labels import SINGLE, Labels, read_labels
from genai_pl.models import load_pretrained, save_pretrained
from genai_pl.models.pooling import label_scores
from genai_pl.peft import (
    add_label_head,
    bitfit,
    bottleneck,
    ia3,
    load_adapter,
    lora,
    prefix,
    prompt,
    save_adapter,
)

peft = pytest.importorskip("peft")
pytestmark = [pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*")]

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40, "vocab_size": 61}
KINDS = {
    "bert": {**SIZES, "max_position_embeddings": 24},
    "roberta": {**SIZES, "max_position_embeddings": 24, "type_vocab_size": 1, "pad_token_id": 1},
    "modernbert": {**SIZES, "max_position_embeddings": 24, "pad_token_id": 0, "local_attention": 6},
    "llama": {**SIZES, "num_key_value_heads": 2, "pad_token_id": 0},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 61, "n_positions": 32, "pad_token_id": 0},
}
LABELS = Labels(("bad", "fair", "good"), SINGLE)
IDS = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(1))
ONES = torch.ones_like(IDS)
AUTO = {Head.score: AutoModelForSequenceClassification, Head.tokens: AutoModelForTokenClassification}


def base_of(kind: str, folder: Path) -> Path:
    """A folder with a body and a head for something else."""
    head = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(kind, **KINDS[kind], num_labels=7))
    shaken(head).save_pretrained(folder)
    return folder


def headed(folder: Path, head: Head = Head.score) -> torch.nn.Module:
    model = load_pretrained(folder)
    torch.manual_seed(0)
    model.set_head(head, LABELS)
    return model


@torch.no_grad()
def outputs(model: torch.nn.Module) -> Tensor:
    if model.config.head is Head.tokens:
        return model.label_logits(model.features(IDS, ONES))
    return label_scores(model, IDS, ONES, 1)[:, 0]


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("kind", "method", "head"),
    [
        *[(kind, lora, Head.score) for kind in KINDS],
        *[(kind, lora, Head.tokens) for kind in ("bert", "gpt2")],
        ("bert", ia3, Head.score),
        ("llama", prompt, Head.score),
    ],
)
def test_peft_gives_the_labels_of_an_adapter(kind: str, method: Callable, head: Head, tmp_path: Path) -> None:
    base = base_of(kind, tmp_path / "base")
    start = headed(base, head)
    token_ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": KINDS[kind].get("pad_token_id")}
    save_pretrained(start, tmp_path / "headed", token_ids=token_ids)
    theirs = AUTO[head].from_pretrained(tmp_path / "headed").eval()
    model = shaken(method(start), of="trained", std=0.1)
    save_adapter(model, tmp_path / "adapter", base=str(base))
    with torch.no_grad():
        said = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()(IDS, attention_mask=ONES).logits
    close(outputs(model), said)


@pytest.mark.parametrize("method", [lora, ia3, bitfit, bottleneck, prompt, prefix])
@pytest.mark.parametrize("kind", ["bert", "llama", "modernbert"])
def test_a_folder_brings_the_head_and_its_names_to_a_base_without(kind: str, method: Callable, tmp_path: Path) -> None:
    if (kind, method) in (("llama", bitfit), ("modernbert", bitfit)):
        pytest.skip("no biases")
    base = base_of(kind, tmp_path / "base")
    options = {"n_tokens": 4} if method in (prompt, prefix) else {}
    model = shaken(method(headed(base), **options), of="trained", std=0.1)
    save_adapter(model, tmp_path / "adapter", base=str(base))
    again = load_pretrained(base)
    again.set_head(Head.none)
    add_label_head(again, tmp_path / "adapter")
    load_adapter(again, tmp_path / "adapter")
    assert read_labels(again.config.extra, again.config.n_labels) == LABELS
    close(outputs(again.eval()), outputs(model))


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_folder_that_peft_wrote_is_read(kind: str, tmp_path: Path) -> None:
    base = base_of(kind, tmp_path / "base")
    theirs = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3, ignore_mismatched_sizes=True).eval()
    targets = ["query", "value"] if kind == "bert" else ["q_proj", "v_proj"]
    config = peft.LoraConfig(
        r=3, target_modules=targets, task_type="SEQ_CLS"
    )  # it saves the classifier, not the pooler
    adapted = shaken(peft.get_peft_model(theirs, config), of="trained", std=0.1).eval()
    with torch.no_grad():
        expected = adapted(IDS, attention_mask=ONES).logits
    adapted.save_pretrained(tmp_path / "adapter")
    model = load_pretrained(base)
    add_label_head(model, tmp_path / "adapter")
    close(outputs(load_adapter(model, tmp_path / "adapter").eval()), expected)
    assert read_labels(model.config.extra, 3).names == ("LABEL_0", "LABEL_1", "LABEL_2")
