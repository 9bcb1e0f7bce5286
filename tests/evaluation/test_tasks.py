"""Tasks of lm-evaluation-harness: what it is given can be read by transformers, and it finds what we find."""

import json
from pathlib import Path

import pytest
import torch

from genai_pl.loading import load
from tests.conftest import TINY
from tests.evaluation.reference_loop import write_lines

TASK = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
{rest}
"""
CHOICE = """output_type: multiple_choice
doc_to_text: "{{prompt}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}, {metric: acc_bytes}]"""
WORD = """output_type: loglikelihood
doc_to_text: "{{text.split(' ')[:-1]|join(' ')}}"
doc_to_target: "{{' '+text.split(' ')[-1]}}"
metric_list: [{metric: perplexity, aggregation: perplexity}, {metric: acc}]"""


def test_a_missing_package_is_one_line(folder: Path, command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("genai_pl.evaluation.harness.find_spec", lambda name: None)
    result = command("evaluate", f"checkpoint={folder}", "tasks=[arc_easy]")
    assert result.status == 2
    assert result.err == "error: tasks needs lm_eval, accelerate: pip install -e '.[eval]'\n"


def test_runs_and_checkpoints_with_adapters_become_folders_that_transformers_can_read(
    command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    asked: list[torch.Tensor] = []
    ids = torch.tensor([[1, 2, 3]])

    def run_tasks(folder: Path, tasks: list[str], **options: object) -> dict[str, float]:
        assert (folder / "tokenizer.json").is_file()
        with torch.no_grad():
            asked.append(AutoModelForCausalLM.from_pretrained(folder)(ids).logits)
        return {f"{task}/acc": 0.5 for task in tasks} | {"given": float(folder.resolve().is_relative_to(tmp_path))}

    monkeypatch.setattr("genai_pl.cli.evaluate.check_harness", lambda: None)
    monkeypatch.setattr("genai_pl.cli.evaluate.run_tasks", run_tasks)
    (tmp_path / "text.txt").write_text("to be, or not to be, that is the question\n" * 40)
    options = ("train", *TINY, "model=gpt", "model.n_head=4", "data.path=text.txt")
    assert command(*options, "hydra.run.dir=base").status == 0
    assert command(*options, "init_from=base", "peft=lora", "optimizer.lr=0.1", "hydra.run.dir=tuned").status == 0
    for checkpoint, is_folder in (("base", 1.0), ("base/checkpoints/last.ckpt", 0.0), ("tuned", 0.0)):
        result = command("evaluate", f"checkpoint={checkpoint}", "tasks=[one,two]", "out=figures.json")
        assert result.status == 0, result.err
        found = json.loads(Path("figures.json").read_text())
        assert (found["one/acc"], found["two/acc"], found["given"]) == (0.5, 0.5, is_folder)
        with torch.no_grad():
            model = load(checkpoint).model
            torch.testing.assert_close(asked[-1], model.logits(model.features(ids)), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(asked[0], asked[2], atol=1e-3)


@pytest.fixture
def tasks(folder: Path, tmp_path: Path) -> Path:
    """A folder with data and YAML files of tasks of one's own."""
    pytest.importorskip("lm_eval")
    rows = [{"prompt": f"{n} is", "choices": ["odd", "even", "n o"], "answer": n % 2} for n in range(12)]
    write_lines(tmp_path / "choices.jsonl", rows)
    write_lines(tmp_path / "texts.jsonl", [{"text": f"{n} and {n} are {word}"} for n, word in enumerate(["ab", "cd"])])
    for name, data, rest in (("parity", "choices", CHOICE), ("word", "texts", WORD)):
        path = tmp_path / f"{data}.jsonl"
        (tmp_path / f"{name}.yaml").write_text(TASK.format(name=name, data=path, rest=rest))
    return tmp_path


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of others' imports
def test_the_harness_finds_what_we_find(tasks: Path, folder: Path, command) -> None:
    result = command("evaluate", f"checkpoint={folder}", "tasks=[parity.yaml,word.yaml]", "out=theirs.json")
    assert result.status == 0, result.err
    theirs = json.loads(Path("theirs.json").read_text())
    for name, data, options in (("parity", "choices", ()), ("word", "texts", ("data.last_word=true",))):
        result = command("evaluate", f"checkpoint={folder}", f"data.path={data}.jsonl", *options, f"out={name}.json")
        assert result.status == 0, result.err
        ours = json.loads(Path(f"{name}.json").read_text())
        assert theirs[f"{name}/acc"] == pytest.approx(ours["accuracy"])
        if name == "parity":
            assert theirs["parity/acc_bytes"] == pytest.approx(ours["accuracy_norm"])
        else:
            assert theirs["word/perplexity"] == pytest.approx(ours["completion_perplexity"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_task_that_is_not_there_is_one_line(tasks: Path, folder: Path, command) -> None:
    for given, said in (
        ("arc_esy", "tasks=arc_esy: no such task of lm-eval, nor a .yaml file; did you mean arc_easy?"),
        ("arc_easy", "tasks=arc_easy: its data cannot be had ("),
    ):
        result = command("evaluate", f"checkpoint={folder}", f"tasks={given}")
        assert result.status in (1, 2)
        assert f"error: {said}" in result.err
        assert "Traceback" not in result.err
