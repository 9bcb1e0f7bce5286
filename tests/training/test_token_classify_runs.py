"""Token classification as commands: trained, exported to transformers' class with equal logits, evaluated, continued."""

import csv
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForTokenClassification, AutoTokenizer

from tests.conftest import TINY

ENCODER = ("model=bert_nano", *TINY, "model.n_head=4", "data.batch_size=8", "optimizer.lr=1e-2")
DECODER = ("model=llama", *TINY, "model.n_head=4", "data.batch_size=8", "optimizer.lr=1e-2")
TAGS = ["O", "B-PER", "I-PER"]


@pytest.fixture
def rows(tmp_path: Path) -> str:
    lines = [{"tokens": ["so", "Al", "Bo", f"{n}"], "tags": [0, 1, 2, 0]} for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return "data.path=rows.jsonl"


@pytest.mark.parametrize(("model", "peft"), [(ENCODER, "none"), (DECODER, "none"), (DECODER, "lora")])
def test_tags_are_learned_and_transformers_gives_them(model, peft: str, rows, command, tmp_path: Path) -> None:
    names = f"data.labels=[{','.join(TAGS)}]"
    steps = ("trainer.max_steps=12", f"peft={peft}", "hydra.run.dir=run")
    result = command("train", "objective=token_classify", *model, rows, names, *steps)
    assert result.status == 0, result.err
    with (tmp_path / "run/metrics.csv").open() as file:
        last = list(csv.DictReader(file))[-1]
    assert {"train/accuracy", "val/accuracy", "val/f1", "val/precision", "val/recall"} <= set(last)
    folder = tmp_path / "run/model"
    if peft != "none":
        assert command("export", "checkpoint=run", "format=merged", "out=merged").status == 0
        folder = tmp_path / "merged"
    # transformers alone: tokens with the spans of their words
    tokenizer, theirs = AutoTokenizer.from_pretrained(folder), AutoModelForTokenClassification.from_pretrained(folder)
    batch = tokenizer("so Al Bo 7", return_tensors="pt", return_offsets_mapping=True)
    spans = batch.pop("offset_mapping")[0].tolist()
    with torch.no_grad():
        best = theirs(**batch).logits[0].argmax(-1)
    starts = [next(i for i, (a, b) in enumerate(spans) if b > a and b > start) for start in (0, 3, 6, 9)]
    expected = [theirs.config.id2label[best[i].item()] for i in starts]
    said = command("generate", "checkpoint=run", "score=true", "prompt=so Al Bo 7")
    assert json.loads(said.out) == {"prompt": "so Al Bo 7", "tokens": ["so", "Al", "Bo", "7"], "tags": expected}
    measured = command("evaluate", "checkpoint=run", rows)
    assert measured.status == 0, measured.err
    assert "40 sentences, 160 words" in measured.out


def test_accumulated_batches_give_the_step_of_one(rows, command, tmp_path: Path) -> None:
    def losses(run: str) -> list[float]:
        with (tmp_path / run / "metrics.csv").open() as file:
            return [float(row["train/loss"]) for row in csv.DictReader(file)]

    common = ("objective=token_classify", *DECODER, rows)
    assert command("train", *common, "hydra.run.dir=one").status == 0
    split = ("data.batch_size=2", "trainer.accumulate_grad_batches=4", "hydra.run.dir=split")
    assert command("train", *common, *split).status == 0
    assert losses("one") == pytest.approx(losses("split"), abs=1e-5)


@pytest.mark.parametrize(
    ("row", "arguments", "message"),
    [
        ({"tokens": ["a", "b"], "tags": ["O"]}, (), "1 tags for 2 words"),
        ({"tokens": ["a"], "tags": ["B-X"]}, ("data.labels=[O,B-PER]",), "'B-X' is not one of the labels O, B-PER"),
        ({"tokens": "a b", "tags": ["O"]}, (), "is not JSON"),
    ],
)
def test_a_bad_row_is_one_line(row: dict, arguments: tuple, message: str, command, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("\n".join([json.dumps(row)] * 20))
    result = command("train", "objective=token_classify", *DECODER, "data.path=rows.jsonl", *arguments)
    assert (result.status in (1, 2), result.err.count("\n")) == (True, 1), result.err
    assert message in result.err
