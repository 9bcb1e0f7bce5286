"""Classification as commands: trained, exported to transformers' classes with equal logits, resumed, evaluated, loaded back."""

import csv
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from genai_pl.loading import load
from tests.conftest import ROOT, TINY

WORDS = {"bad": ["awful", "dull"], "fair": ["plain", "usual"], "good": ["lovely", "great"]}
ENCODER = ("model=bert_nano", *TINY, "model.n_head=4", "data.batch_size=8", "optimizer.lr=1e-2")
DECODER = ("model=llama", *TINY, "model.n_head=4", "data.batch_size=8", "optimizer.lr=1e-2")
METHODS = sorted(path.stem for path in (ROOT / "conf" / "peft").glob("*.yaml") if path.stem != "none")


@pytest.fixture
def rows(tmp_path: Path) -> str:
    names = list(WORDS)
    lines = [{"text": f"{WORDS[names[n % 3]][n % 2]} {n}", "label": names[n % 3], "pair": f"p{n}"} for n in range(60)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return "data.path=rows.jsonl"


def rows_of(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


@torch.no_grad()
def theirs(folder: Path, *texts: list[str], model: object = None) -> torch.Tensor:
    """Logits by transformers alone, tokenizer and padding included."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(*texts, return_tensors="pt", padding=True)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval() if model is None else model
    return model(**batch).logits


@pytest.mark.parametrize("model", [ENCODER, DECODER], ids=["encoder", "decoder"])
def test_a_classifier_learns_and_transformers_gives_its_probabilities(model, rows, command, tmp_path: Path) -> None:
    result = command("train", "objective=classify", *model, rows, "trainer.max_steps=25", "hydra.run.dir=run")
    assert result.status == 0, result.err
    assert "single label classification: bad, fair, good" in result.out
    last = rows_of(tmp_path / "run")[-1]
    assert {"train/accuracy", "val/accuracy", "val/f1", "val/loss"} <= set(last)
    values = json.loads((tmp_path / "run/model/config.json").read_text())
    assert values["id2label"] == {"0": "bad", "1": "fair", "2": "good"}
    assert values["problem_type"] == "single_label_classification"
    # generate.py says what transformers computes
    texts = ["awful 1", "lovely 22 and more"]
    expected = theirs(tmp_path / "run/model", texts).softmax(-1)
    (tmp_path / "prompts.txt").write_text("\n".join(texts))
    said = command("generate", "checkpoint=run", "score=true", "prompt_file=prompts.txt")
    assert said.status == 0, said.err
    for line, row in zip(map(json.loads, said.out.splitlines()), expected, strict=True):
        assert list(line["probabilities"].values()) == pytest.approx(row.tolist(), abs=1e-5)
        assert line["label"] == list(WORDS)[row.argmax()]
    # evaluate.py, on all rows, says the share that transformers gets right
    lines = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    hits = theirs(tmp_path / "run/model", [line["text"] for line in lines]).argmax(-1)
    share = sum(list(WORDS)[n] == line["label"] for n, line in zip(hits, lines, strict=True)) / len(lines)
    measured = command("evaluate", "checkpoint=run", rows, "out=figures.json")
    assert measured.status == 0, measured.err
    assert json.loads((tmp_path / "figures.json").read_text())["accuracy"] == pytest.approx(share)
    # the exported folder is where the next run begins: same head, same labels
    again = command("train", "objective=classify", "init_from=run/model", rows, "trainer.max_steps=1",
                    "optimizer.lr=1e-30", "data.batch_size=8", "hydra.run.dir=again")  # fmt: skip
    assert again.status == 0, again.err
    assert torch.equal(load("again").model.score.weight, load("run").model.score.weight)


def test_pairs_several_labels_and_numbers(command, tmp_path: Path) -> None:
    lines = [
        {"text": f"t{n}", "text_pair": f"p{n % 4}", "tags": ["a", "b"][: n % 3], "stars": n / 7} for n in range(40)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    data = ("data.path=rows.jsonl", "data.text_pair=text_pair")
    result = command("train", "objective=classify", *DECODER, *data, "data.label=tags", "objective.class_weights=balanced",
                     "hydra.run.dir=tags")  # fmt: skip
    assert result.status == 0, result.err
    assert "multi label classification: a, b" in result.out
    assert "query=" in result.out.splitlines()[-1], "the command to try gives both texts"
    refused = command("generate", "checkpoint=tags", "score=true", "prompt=p1")
    assert (refused.status, "query=" in refused.err) == (2, True), refused.err
    said = command("generate", "checkpoint=tags", "score=true", "query=t1", "prompt=p1")
    expected = theirs(tmp_path / "tags/model", ["t1"], ["p1"])[0].sigmoid()
    line = json.loads(said.out)
    assert list(line["probabilities"].values()) == pytest.approx(expected.tolist(), abs=1e-5)
    assert line["labels"] == [name for name, p in line["probabilities"].items() if p > 0.5]
    result = command("train", "objective=classify", *ENCODER, *data, "data.label=stars", "hydra.run.dir=stars")
    assert result.status == 0, result.err
    assert {"val/mse", "val/pearson"} <= set(rows_of(tmp_path / "stars")[-1])
    said = json.loads(command("generate", "checkpoint=stars", "score=true", "query=t1", "prompt=p1").out)
    assert said["score"] == pytest.approx(theirs(tmp_path / "stars/model", ["t1"], ["p1"]).item(), abs=1e-5)
    measured = command("evaluate", "checkpoint=stars", *data, "data.label=stars")
    assert measured.status == 0, measured.err
    assert "pearson" in measured.out
    refused = command("evaluate", "checkpoint=stars", "data.path=rows.jsonl", "data.label=stars")
    assert (refused.status, "data.text_pair" in refused.err) == (2, True), refused.err


def test_a_step_is_exact_whatever_its_batches_and_a_resumed_run_is_the_same(rows, command, tmp_path: Path) -> None:
    weights = "objective.class_weights=[1.0,3.0,0.5]"
    common = ("objective=classify", *ENCODER, rows, weights, "callbacks.checkpoint.every_n_steps=2")
    assert command("train", *common, "hydra.run.dir=run").status == 0
    parts = ("data.batch_size=2", "trainer.accumulate_grad_batches=4")
    assert command("train", *common, *parts, "hydra.run.dir=parts").status == 0
    whole, split = rows_of(tmp_path / "run"), rows_of(tmp_path / "parts")
    for a, b in zip(whole, split, strict=True):
        assert float(a["train/loss"]) == pytest.approx(float(b["train/loss"]), abs=1e-5)
    assert command("train", *common, "hydra.run.dir=half").status == 0
    assert command("train", "resume=half/checkpoints/step=000002.ckpt").status == 0
    resumed = rows_of(tmp_path / "half")
    assert [row["train/loss"] for row in resumed] == [row["train/loss"] for row in whole]


@pytest.mark.parametrize("method", METHODS)
def test_every_adapter_trains_the_head_whole_and_comes_back(method: str, rows, command, tmp_path: Path) -> None:
    bias = ("model.bias=true",) if method == "bitfit" else ()
    result = command("train", "objective=classify", *DECODER, *bias, rows, f"peft={method}", "hydra.run.dir=run")
    assert result.status == 0, result.err
    adapted, of_checkpoint = load("run").model, load("run/checkpoints/last.ckpt").model
    ids, segments = torch.arange(40, 60)[None], torch.ones(1, 20, dtype=torch.long)
    from genai_pl.models.pooling import label_scores

    with torch.no_grad():
        first, second = (label_scores(model, ids, segments, 1) for model in (adapted, of_checkpoint))
    assert first.abs().max() > 1e-4  # a head that is not trained gives zeros
    assert torch.equal(first, second)
    assert adapted.config.extra["id2label"] == {"0": "bad", "1": "fair", "2": "good"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("data.label=tone",), "no column 'tone'"),
        (("data.labels=[bad,good]",), "'fair' is not one of the labels bad, good"),
        (("data.problem_type=regression",), "is not a number (data.problem_type=regression)"),
        (("objective.class_weights=[1,2]",), "objective.class_weights has 2 numbers for 3 labels"),
        (("objective.class_weights=equal",), "objective.class_weights=equal is neither balanced nor a list"),
    ],
)
def test_a_mistake_is_one_line(arguments: tuple[str, ...], message: str, rows, command) -> None:
    result = command("train", "objective=classify", *ENCODER, rows, *arguments)
    assert (result.status in (1, 2), result.err.count("\n")) == (True, 1), result.err
    assert message in result.err


@pytest.mark.parametrize("model", [ENCODER, DECODER], ids=["encoder", "decoder"])
def test_a_pipeline_of_transformers_truncates_as_the_run_does(model, rows, command, tmp_path: Path) -> None:
    from transformers import pipeline

    assert command("train", "objective=classify", *model, rows, "hydra.run.dir=run").status == 0
    text = "awful " * 30  # 180 bytes, of which the context has 32
    classify = pipeline("text-classification", model=str(tmp_path / "run/model"), top_k=None)
    expected = {entry["label"]: entry["score"] for entry in classify([text], truncation=True)[0]}
    (tmp_path / "prompts.txt").write_text(text)
    said = command("generate", "checkpoint=run", "score=true", "prompt_file=prompts.txt")
    assert json.loads(said.out)["probabilities"] == pytest.approx(expected, abs=1e-5), said.err


def test_steps_of_rows_that_weigh_nothing_have_no_loss(rows, command, tmp_path: Path) -> None:
    options = (rows, "data.batch_size=1", "objective.class_weights=[0,0,1]", "hydra.run.dir=run")
    result = command("train", "objective=classify", *ENCODER, *options, "trainer.max_steps=6")
    assert result.status == 0, result.err
    losses = [float(row["train/loss"]) for row in rows_of(tmp_path / "run") if row["train/loss"]]
    assert 0.0 in losses
    assert all(loss >= 0 for loss in losses)  # and none is NaN


def test_the_cost_of_a_classifier_is_planned_without_its_data(command) -> None:
    result = command("train", "objective=classify", *ENCODER, "data.path=nowhere.jsonl", "dry_run=true")
    assert result.status == 0, result.err


def test_what_is_cut_and_what_nothing_teaches_is_said(rows: str, command, tmp_path: Path) -> None:
    lines = [{"text": "usual " * 90, "label": "fair"}, {"text": "odd", "label": "strange"}]
    (tmp_path / "held.jsonl").write_text("\n".join(map(json.dumps, lines)))
    result = command("train", "objective=classify", *ENCODER, rows, "data.val_path=held.jsonl", "data.seq_len=32",
                     "trainer.max_steps=1", "hydra.run.dir=run")  # fmt: skip
    assert result.status == 0, result.err
    assert "data        1 of 2 texts fill 32 tokens, where longer ones are cut (data.seq_len)" in result.out
    assert "labels      no training row has strange: nothing teaches it" in result.out + result.err
