"""Reranking as commands: trained by both losses, exported to a class of transformers with equal scores, evaluated."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tests.conftest import TINY

ENCODER = ("model=bert_nano", *TINY, "model.n_head=4", "data.batch_size=4", "optimizer.lr=1e-2")
DECODER = ("model=llama", *TINY, "model.n_head=4", "data.batch_size=4", "optimizer.lr=1e-2")


@pytest.fixture
def rows(tmp_path: Path) -> str:
    lines = [
        {"query": f"q{n}", "documents": [f"yes {n}", "no", f"never {n}"][: 2 + n % 2], "labels": [1, 0, 0][: 2 + n % 2]}
        for n in range(40)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return "data.path=rows.jsonl"


@pytest.mark.parametrize(("loss", "model"), [("pointwise", DECODER), ("listwise", ENCODER)])
def test_a_reranker_gives_the_scores_of_transformers(loss: str, model, rows, command, tmp_path: Path) -> None:
    result = command("train", "objective=rerank", *model, rows, f"objective.loss={loss}", "hydra.run.dir=run")
    assert result.status == 0, result.err
    folder = tmp_path / "run/model"
    values = json.loads((folder / "config.json").read_text())
    assert (values["id2label"], values.get("problem_type")) == ({"0": "relevance"}, None)
    tokenizer, theirs = (
        AutoTokenizer.from_pretrained(folder),
        AutoModelForSequenceClassification.from_pretrained(folder),
    )
    with torch.no_grad():
        expected = theirs(**tokenizer("q1", "yes 1", return_tensors="pt")).logits.sigmoid().item()
    said = command("generate", "checkpoint=run", "score=true", "query=q1", "prompt=yes 1")
    assert json.loads(said.out)["score"] == pytest.approx(expected, abs=1e-5)
    # a text alone is no pair
    refused = command("generate", "checkpoint=run", "score=true", "prompt=yes 1")
    assert (refused.status, "query=" in refused.err) == (2, True), refused.err
    (tmp_path / "texts.jsonl").write_text('{"text": "yes 1", "label": 1}')
    refused = command("evaluate", "checkpoint=run", "data.path=texts.jsonl")
    assert (refused.status, "data.text_pair" in refused.err) == (2, True), refused.err
    # lists, and the same pairs one by one
    measured = command("evaluate", "checkpoint=run", rows, "out=lists.json")
    assert measured.status == 0, measured.err
    assert "40 queries, 100 documents" in measured.out
    pairs = [
        {"query": row["query"], "documents": text, "labels": label}
        for row in map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())
        for text, label in zip(row["documents"], row["labels"], strict=True)
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    assert command("evaluate", "checkpoint=run", "data.path=pairs.jsonl", "out=pairs.json").status == 0
    first, second = (json.loads((tmp_path / name).read_text()) for name in ("lists.json", "pairs.json"))
    assert (first["mrr"], first["recall@1"]) == pytest.approx((second["mrr"], second["recall@1"]))


def test_accumulated_batches_give_the_step_of_one(rows, command, tmp_path: Path) -> None:
    import csv

    def losses(run: str) -> list[float]:
        with (tmp_path / run / "metrics.csv").open() as file:
            return [float(row["train/loss"]) for row in csv.DictReader(file)]

    common = ("objective=rerank", "objective.loss=listwise", *ENCODER, rows)
    assert command("train", *common, "hydra.run.dir=one").status == 0
    split = ("data.batch_size=1", "trainer.accumulate_grad_batches=4", "hydra.run.dir=split")
    assert command("train", *common, *split).status == 0
    assert losses("one") == pytest.approx(losses("split"), abs=1e-5)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"query": "q", "documents": ["a", "b"], "labels": [1]}, "1 numbers for 2 documents"),
        ({"query": "q", "documents": ["a"], "labels": [3]}, "3 is no label: give a number from 0 to 1"),
        ({"query": "q", "documents": "a"}, "no column 'labels'"),
    ],
)
def test_a_bad_row_is_one_line(row: dict, message: str, command, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    result = command("train", "objective=rerank", *ENCODER, "data.path=rows.jsonl")
    assert (result.status in (1, 2), result.err.count("\n")) == (True, 1), result.err
    assert message in result.err


@pytest.mark.parametrize(
    ("row", "arguments", "message"),
    [
        (
            {"documents": "yes", "labels": 1},
            ("objective.loss=listwise",),
            "no row has documents of different relevance",
        ),
        ({"documents": ["a", "b"], "labels": [0, 0]}, (), "every document has the relevance 0"),
    ],
)
def test_rows_that_compare_nothing_are_refused(row: dict, arguments, message: str, command, tmp_path: Path) -> None:
    lines = [{"query": f"q{n}", **row} for n in range(20)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    result = command("train", "objective=rerank", *ENCODER, "data.path=rows.jsonl", *arguments)
    assert (result.status, result.err.count("\n")) == (1, 1), result.err
    assert message in result.err
