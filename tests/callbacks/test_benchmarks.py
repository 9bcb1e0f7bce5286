"""Benchmarks while training: transformers finds the same numbers on the exported model, and training does not notice them."""

import json
from pathlib import Path

import pytest
import torch

from tests.cli.test_commands import table
from tests.conftest import TINY

JOB = (*TINY, "optimizer=adamw", "optimizer.lr=1e-2", "scheduler=constant", "scheduler.warmup_steps=0", "logger=csv")
EVAL = ("eval.every_n_steps=2", "eval.tasks.text=sentence.txt", "eval.tasks.qa=questions.jsonl", "eval.limit=6")
SENTENCE = "The quick fox is here"


@pytest.fixture
def data(tmp_path: Path) -> None:
    (tmp_path / "sentence.txt").write_text(SENTENCE)
    rows = [{"prompt": f"{i} and", "choices": ["abc", "e t", "qz"], "answer": i % 3} for i in range(8)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def metrics(run: Path, step: int) -> dict[str, float]:
    """The benchmarks of a step in metrics.csv."""
    import csv

    with (run / "metrics.csv").open(newline="") as file:
        row = next(row for row in csv.DictReader(file) if row["step"] == str(step))
    return {name: float(value) for name, value in row.items() if name.startswith("eval/") and value}


def logprob(model, tokenizer, prompt: str, text: str) -> float:
    """Log-probability of a text after a prompt under a model of transformers."""
    ids = tokenizer(prompt + text, return_tensors="pt", add_special_tokens=False).input_ids
    n = len(tokenizer(prompt, add_special_tokens=False).input_ids)
    logprobs = model(ids).logits.double().log_softmax(-1)[0, n - 1 : -1]
    return logprobs.gather(1, ids[0, n:, None]).sum().item()


@pytest.mark.usefixtures("data")
def test_the_last_benchmarks_are_what_transformers_finds_on_the_exported_model(command, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result = command("train", *JOB, *EVAL, "hydra.run.dir=run")
    assert result.status == 0, result.err
    found = metrics(tmp_path / "run", 4)
    model = AutoModelForCausalLM.from_pretrained("run/model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained("run/model")
    with torch.no_grad():
        loss = -logprob(model, tokenizer, SENTENCE[0], SENTENCE[1:]) / (len(SENTENCE) - 1)
        right = 0
        for i in range(6):
            scores = [logprob(model, tokenizer, f"{i} and", f" {choice}") for choice in ("abc", "e t", "qz")]
            right += scores.index(max(scores)) == i % 3
    assert found["eval/text/loss"] == pytest.approx(loss, abs=2e-5)
    assert found["eval/qa/accuracy"] == right / 6
    assert found["eval/qa/accuracy_low"] <= found["eval/qa/accuracy"] < found["eval/qa/accuracy_high"]
    # printed, kept in the results, and shown in the report
    assert f"eval/qa/accuracy {right / 6:.4f} (" in result.out
    assert json.loads((tmp_path / "run" / "results.json").read_text())["eval/text/loss"] == found["eval/text/loss"]
    assert "eval/qa/accuracy" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.usefixtures("data")
def test_training_is_the_same_with_benchmarks_and_a_run_in_parts_has_the_same_ones(command, tmp_path: Path) -> None:
    for name, options in (("plain", ()), ("whole", EVAL)):
        assert command("train", *JOB, *options, "model.dropout=0.1", f"hydra.run.dir={name}").status == 0
    assert command("train", *JOB, *EVAL, "model.dropout=0.1", "trainer.max_steps=2", "hydra.run.dir=parts").status == 0
    result = command("train", "resume=parts", "trainer.max_steps=4")
    assert result.status == 0, result.err
    assert table(tmp_path / "plain") == table(tmp_path / "whole")
    assert table(tmp_path / "plain")[4] == table(tmp_path / "parts")[4]
    assert metrics(tmp_path / "parts", 4) == metrics(tmp_path / "whole", 4)
    assert metrics(tmp_path / "parts", 2) == metrics(tmp_path / "whole", 2)


@pytest.mark.usefixtures("data")
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("eval.every_n_steps=2",), "eval.tasks={}: give both"),
        (("eval.tasks.a=sentence.txt",), "eval.every_n_steps=null: give both"),
        ((*EVAL, "eval.tasks.b=nowhere.txt"), "eval.tasks.b.path=nowhere.txt"),
        ((*EVAL, "eval.tasks.b={path: sentence.txt, strid: 2}"), "eval.tasks.b.strid: no such option, did you mean stride?"),
        ((*EVAL, "objective=mlm", "model=encoder_nano"), "eval.tasks: for decoders that predict the next token"),
        ((*EVAL, "strategy=tensor_parallel", "trainer.devices=2", "trainer.accelerator=cpu"), "no process holds the whole"),
    ],
)  # fmt: skip
def test_benchmarks_that_cannot_be_measured_are_one_line(options: tuple[str, ...], said: str, command) -> None:
    result = command("train", *JOB, *options)
    assert result.status in (1, 2), result.out
    assert result.err.count("\n") == 1, result.err
    assert said in result.err


@pytest.mark.slow
@pytest.mark.usefixtures("data")
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_one_of_several_processes_measures_the_whole_model(strategy: str, command, tmp_path: Path) -> None:
    options = (f"strategy={strategy}", "trainer.devices=2", "trainer.accelerator=cpu", "data.batch_size=2")
    result = command("train", *JOB, *EVAL, *options, "hydra.run.dir=run")
    assert result.status == 0, result.err
    found = metrics(tmp_path / "run", 4)
    measured = command("evaluate", "checkpoint=run", "data.path=sentence.txt", "out=figures.json")
    assert measured.status == 0, measured.err
    assert found["eval/text/loss"] == pytest.approx(json.loads(Path("figures.json").read_text())["loss"], abs=1e-6)
