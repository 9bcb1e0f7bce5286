"""Choices, last words and calibration: what a plain loop over transformers' model finds."""

import csv
import json
from pathlib import Path

import pytest
import torch
from torchmetrics.functional.classification import multiclass_calibration_error

from genai_pl.data import byte_tokenizer
from genai_pl.data.columns import Place
from genai_pl.errors import DataError
from genai_pl.evaluation import Kind, Question, choice_metrics, score, text_windows
from genai_pl.evaluation.examples import read_choice
from genai_pl.kernels.chunked_logits import tokens_at_once
from genai_pl.loading import load
from tests.evaluation.reference_loop import CONTEXT, greedy_text, reference_nll, write_lines

COLORS = ["red", "green ones", "blé", "any"]
QUESTIONS = [
    {"prompt": "grass is", "choices": COLORS, "answer": 1},
    {"prompt": "the sky\n", "choices": [*COLORS[::-1], "grey"], "answer": 4},
    {"prompt": "a", "choices": [" b", "c"], "answer": 0},
    {"prompt": "", "choices": ["one", "two", "three"], "answer": 2},
    {"prompt": "longer than the context of the model is", "choices": ["x", "yes"], "answer": 0},
]


def figures(command, folder: Path, *options: str) -> dict:
    result = command("evaluate", f"checkpoint={folder}", *options, "out=figures.json")
    assert result.status == 0, result.err
    return json.loads(Path("figures.json").read_text())


def test_the_answer_is_the_choice_that_transformers_finds_most_likely(
    folder: Path, theirs, command, tmp_path: Path
) -> None:
    plainly = per_byte = 0
    for n, question in enumerate(QUESTIONS):
        prompt, choices = question["prompt"], question["choices"]
        given, gap = list(prompt.rstrip().encode()) or [byte_tokenizer().bos_token_id], prompt[len(prompt.rstrip()) :]
        losses = []
        for choice in choices:
            said = list((choice if gap or choice[0] == " " else f" {choice}").encode())
            said = list(gap.encode()) + said
            losses.append(reference_nll(theirs, given[-(CONTEXT + 1 - len(said)) :], said)[0])
        by_byte = [loss / len(choice.encode()) for loss, choice in zip(losses, choices, strict=True)]
        if n % 2:  # half of them are right by loss, so that the share is neither 0 nor 1
            question["answer"] = losses.index(min(losses))
        plainly += question["answer"] == losses.index(min(losses))
        per_byte += question["answer"] == by_byte.index(min(by_byte))
    path = write_lines(tmp_path / "choices.jsonl", QUESTIONS)
    found = figures(command, folder, f"data.path={path}")
    assert found["accuracy"] == pytest.approx(plainly / 5)
    assert found["accuracy_norm"] == pytest.approx(per_byte / 5)
    assert found["chance"] == pytest.approx((1 / 4 + 1 / 5 + 1 / 2 + 1 / 3 + 1 / 2) / 5)
    assert 0 <= found["accuracy_low"] < found["accuracy"] < found["accuracy_high"] <= 1
    assert (found["rows"], found["cut"]) == (5, 2)


def test_a_question_is_asked_as_in_arc_and_answers_are_numbers_letters_or_texts(
    folder: Path, command, tmp_path: Path
) -> None:
    same = []
    for name, answers in (("text", ["any", "red"]), ("letter", ["D", "A"]), ("number", [3, 0])):
        rows = [{"question": q, "choices": COLORS, "answer": a} for q, a in zip(["Hm?", "So?"], answers, strict=True)]
        path = write_lines(tmp_path / f"{name}.jsonl", rows)
        same.append(figures(command, folder, f"data.path={path}"))
    rows = [{"prompt": f"Question: {r['question']}\nAnswer:", "choices": COLORS, "answer": r["answer"]} for r in rows]
    same.append(figures(command, folder, f"data.path={write_lines(tmp_path / 'written_out.jsonl', rows)}"))
    for found in same:
        found.pop("config")
        assert found == same[0]


def test_equal_choices_share_the_credit_and_bytes_count_not_characters() -> None:
    losses = torch.tensor([2.0, 2.0, 3.0, 4.0, 4.1], dtype=torch.float64)
    questions = [Question("", ["a", "bc", "d"], 0), Question("", ["xy", "é"], 1)]
    found = choice_metrics(losses, questions)
    assert found["accuracy"] == pytest.approx((1 / 2 + 0) / 2)
    assert found["accuracy_norm"] == pytest.approx(0)  # 4.1 nats are more than 4.0 for two bytes, too
    assert choice_metrics(losses[3:], [Question("", ["xy", "é!"], 1)])["accuracy_norm"] == 1.0


BAD = {
    "column 'prompt': missing (null)": (None, ["a", "b"], 0),
    "column 'choices': 'ab' is not JSON": ("q", "ab", 0),
    "column 'choices': missing (null)": ("q", ["a", None], 0),
    "choices must be a list of two or more texts": ("q", ["a"], 0),
    "answer 2 is not the number (from 0), letter or text of one of 2 choices": ("q", ["a", "b"], 2),
    "answer -1 is not": ("q", ["a", "b"], -1),
    "answer 'C' is not": ("q", ["a", "b"], "C"),
    "answer None is not": ("q", ["a", "b"], None),
    "answer True is not": ("q", ["a", "b"], True),
    "answer 'A' stands for several choices": ("q", ["B", "A"], "A"),
    "answer 'b' stands for several choices": ("q", ["a", "b", "b"], "b"),
}


@pytest.mark.parametrize("said", BAD)
def test_a_bad_question_is_named(said: str) -> None:
    with pytest.raises(DataError, match=r"q\.jsonl: row 7") as caught:
        read_choice(Place("q.jsonl", 7), dict(zip(Kind.choices.value, BAD[said], strict=True)))
    assert said in str(caught.value)


def test_a_choice_that_is_there_twice_is_scored_where_the_answer_says_which(
    folder: Path, command, tmp_path: Path
) -> None:
    rows = [{"question": "Hm?", "choices": ["red", "any", "red", "blue"], "answer": n} for n in (1, 3)]
    found = figures(command, folder, f"data.path={write_lines(tmp_path / 'twice.jsonl', rows)}")
    assert (found["rows"], found["chance"]) == (2, 1 / 4)


def test_questions_of_a_csv_are_those_of_the_same_json(folder: Path, command, tmp_path: Path) -> None:
    rows = [{"prompt": q, "choices": COLORS, "answer": n} for q, n in (("Hm?", 3), ("So?", 0))]
    with (tmp_path / "choices.csv").open("w", newline="") as file:
        lines = csv.DictWriter(file, ["prompt", "choices", "answer"])
        lines.writeheader()
        lines.writerows([{**row, "choices": json.dumps(COLORS)} for row in rows])
    found = [
        figures(command, folder, f"data.path={path}")
        for path in ("choices.csv", write_lines(tmp_path / "c.jsonl", rows))
    ]
    assert found[0].pop("config") != found[1].pop("config")
    assert found[0] == found[1]


def test_a_bad_row_is_one_line_of_the_command(folder: Path, command, tmp_path: Path) -> None:
    good = {"prompt": "a", "choices": ["b", "c"], "answer": "c"}
    for name, row, options, said in (
        ("answer", {**good, "answer": "d"}, (), "row 2: answer 'd' is not the number"),
        ("long", {**good, "choices": ["b" * 30, "c"]}, (), "row 2: completion has 31 tokens, more than the context"),
        ("word", {"text": "word"}, ("data.last_word=true",), "row 2: 1 words; there is nothing to predict"),
        ("stride", good, ("data.stride=4",), "data.stride=4: prompts and completions have no windows"),
        ("shots", good, ("num_fewshot=1",), "num_fewshot=1 is for tasks="),
        ("dtype", good, ("dtype=int8", "precision=bf16"), "dtype=int8 computes in float32"),
        ("harness", good, ("dtype=int8", "tasks=[one]"), "dtype=int8 is for data.path="),
    ):
        first = {"text": "two words"} if "text" in row else good
        path = write_lines(tmp_path / f"{name}.jsonl", [first, row])
        result = command("evaluate", f"checkpoint={folder}", f"data.path={path}", *options)
        assert result.status in (1, 2)
        assert result.err.count("\n") == 1
        assert result.err.startswith("error: ")
        assert said in result.err


def test_the_last_word_of_a_text_is_its_completion(folder: Path, theirs, command, tmp_path: Path) -> None:
    prompts = ["I know the", "go, and \n", "so"]
    words = [greedy_text(theirs, f"{prompts[0]} ", 3), "home", "it"]
    texts = [f"{prompt} {word}" for prompt, word in zip(prompts, words, strict=True)]
    path = write_lines(tmp_path / "texts.jsonl", [{"body": f"{text}\n"} for text in texts])
    found = figures(command, folder, f"data.path={path}", "data.column=body", "data.last_word=true")
    hits, total = 0, 0.0
    for prompt, text in zip(prompts, texts, strict=True):
        nll, right = reference_nll(theirs, list(prompt.rstrip().encode()), list(text[len(prompt.rstrip()) :].encode()))
        total, hits = total + nll, hits + all(right)
    assert found["accuracy"] == pytest.approx(hits / 3)
    assert found["completion_perplexity"] == pytest.approx(torch.tensor(total / 3).exp().item(), rel=1e-4)
    assert found["accuracy_low"] <= found["accuracy"] <= found["accuracy_high"]


@torch.no_grad()
def test_the_calibration_error_is_torchmetrics_of_all_logits_which_are_never_made(
    folder: Path, theirs, monkeypatch: pytest.MonkeyPatch
) -> None:
    from genai_pl.evaluation import text_metrics

    ours, texts = load(str(folder)), ["to be, or not to be", "that is a question", "whether tis nobler"]
    probabilities, goals = [], []
    for ids in (list(text.encode()) for text in texts):
        probabilities.append(theirs(torch.tensor([ids[:-1]])).logits[0].softmax(-1))
        goals.append(torch.tensor(ids[1:]))
    said, goal = torch.cat(probabilities), torch.cat(goals)
    goal[::3] = said.argmax(-1)[::3]  # a third of it is right
    wanted = multiclass_calibration_error(said, goal, num_classes=258, n_bins=15).item()

    monkeypatch.setattr("genai_pl.kernels.chunked_logits.CHUNK_BYTES", 4 * 258 * 5)
    assert tokens_at_once(258, torch.device("cpu")) == 5
    seen, logits = [], ours.model.logits
    monkeypatch.setattr(ours.model, "logits", lambda hidden: seen.append(len(hidden)) or logits(hidden))
    rows = text_windows(texts, ours.tokenizer, seq_len=CONTEXT)
    scores = score(ours.model, rows, batch_tokens=1)  # row by row, the longest first
    assert max(seen) == 5
    order = sorted(range(3), key=lambda n: -len(texts[n]))
    best = torch.cat([probabilities[n].argmax(-1) for n in order])
    torch.testing.assert_close(scores.confidence, torch.cat([probabilities[n].max(-1).values for n in order]))
    right = torch.cat([goal.split([len(g) for g in goals])[n] for n in order]) == best
    found = text_metrics(scores._replace(correct=right), rows, [1] * 258)["calibration_error"]
    assert found == pytest.approx(wanted, rel=1e-4)
    assert found > 0.05
