"""Generative tasks: completions are those of transformers' generate, and scores what a loop over them finds."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from genai_pl.config.tasks import GenerationTaskOptions
from genai_pl.evaluation.generative import ExactMatch, GenerativeRow, normalize
from genai_pl.evaluation.generative.scorers import program_of
from tests.evaluation.reference_loop import write_lines

PROMPTS = [f"{word} and then" for word in ("one", "two", "longer", "four", "x")]
N_TOKENS = 6


@pytest.fixture
def written(theirs: nn.Module) -> list[str]:
    """The greedy completions of transformers; byte n is token n."""
    texts = []
    for prompt in PROMPTS:
        ids = torch.tensor([list(prompt.encode())])
        new = theirs.generate(ids, max_new_tokens=N_TOKENS, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        texts.append(bytes(new.tolist()).decode())
    return texts


def evaluate(command, folder: Path, *options: str) -> dict[str, float]:
    Path("figures.json").unlink(missing_ok=True)
    arguments = (f"checkpoint={folder}", f"data.max_new_tokens={N_TOKENS}", "out=figures.json", *options)
    result = command("evaluate", *arguments)
    assert result.status == 0, result.err
    return json.loads(Path("figures.json").read_text())


def test_exact_match_is_the_share_of_prompts_that_greedy_decoding_continues_by_the_answer(
    folder: Path, written: list[str], command, tmp_path: Path
) -> None:
    answers = [f" {text}\n" if n % 2 else "other" for n, text in enumerate(written)]
    write_lines(tmp_path / "rows.jsonl", [{"prompt": p, "answer": a} for p, a in zip(PROMPTS, answers, strict=True)])
    for batch_tokens in (10_000, 1):  # all in one batch, or one by one
        found = evaluate(command, folder, "data.path=rows.jsonl", f"batch_tokens={batch_tokens}")
        assert found["exact_match"] == 2 / 5
        assert found["exact_match_low"] < 2 / 5 < found["exact_match_high"]
        assert (found["rows"], found["unfinished"]) == (5, 1.0)
    # several right answers, an answer within a longer text, and what the model wrote in a file
    rows = [{"question": p, "answer": ["no", text[2:5]]} for p, text in zip(PROMPTS, written, strict=True)]
    write_lines(tmp_path / "many.jsonl", [{"prompt": row["question"], "answer": row["answer"]} for row in rows])
    found = evaluate(command, folder, "data.path=many.jsonl", "data.extract='^..(...)'", "completions=written.jsonl")
    assert (found["exact_match"], found["extracted"]) == (1.0, 1.0)
    kept = [json.loads(line) for line in Path("written.jsonl").read_text().splitlines()]
    assert [row["completion"] for row in kept] == written
    assert kept[0]["note"] == written[0][2:5]


def test_a_function_scores_each_completion_with_its_row(
    folder: Path, written: list[str], command, tmp_path: Path
) -> None:
    (tmp_path / "scores.py").write_text(
        "def share(completion, row):\n    return completion.count(row['letter']) / len(completion)\n\n"
        "def broken(completion, row):\n    return None\n\n"
        "def leaves(completion, row):\n    raise SystemExit(0)\n"
    )
    write_lines(tmp_path / "rows.jsonl", [{"prompt": p, "letter": t[0]} for p, t in zip(PROMPTS, written, strict=True)])
    found = evaluate(command, folder, "data.path=rows.jsonl", "data.score=scores.py:share")
    shares = torch.tensor([text.count(text[0]) / len(text) for text in written], dtype=torch.float64)
    assert found["score"] == pytest.approx(shares.mean().item())
    width = 1.959964 * shares.std().item() / len(shares) ** 0.5
    assert found["score_high"] - found["score"] == pytest.approx(width)
    options = ("data.path=rows.jsonl", "data.max_new_tokens=4", "data.score=scores:broken")
    result = command("evaluate", f"checkpoint={folder}", *options)
    assert (result.status, result.err) == (
        2,
        "error: data.score=scores:broken: gave None for row 1; give a finite number\n",
    )
    result = command("evaluate", f"checkpoint={folder}", *options[:2], "data.score=scores:leaves")
    assert (result.status, result.err) == (2, "error: data.score=scores:leaves: raised SystemExit: 0 for row 1\n")


@pytest.mark.parametrize(("seq_len", "longest"), [(64, 32), (512, 256), (8192, 256)])
def test_completions_leave_half_of_a_short_context_to_the_prompt(seq_len: int, longest: int) -> None:
    assert GenerationTaskOptions().longest(seq_len) == longest
    assert GenerationTaskOptions(max_new_tokens=300).longest(seq_len) == 300


def test_programs_of_the_model_are_run_only_with_consent_and_count_by_how_they_end(
    folder: Path, command, tmp_path: Path
) -> None:
    # what the model writes ends a comment
    start = "def f(x):\n    return x\n#"
    tests = ["assert candidate(1) == 1", "assert candidate(1) == 2", "unknown", "while True: pass"]
    rows = [
        {"prompt": start, "test": f"def check(candidate):\n    {test}\n", "entry_point": "f"}
        for test in (*tests, tests[0])
    ]
    write_lines(tmp_path / "code.jsonl", rows)
    refused = command("evaluate", f"checkpoint={folder}", "data.path=code.jsonl")
    assert (refused.status, refused.err.count("\n")) == (2, 1)
    assert "execute_code=false" in refused.err
    assert "docs/security.md" in refused.err
    options = ("data.path=code.jsonl", "execute_code=true", "data.seconds=0.5", "data.samples=2", "data.k=[1,2]")
    found = evaluate(command, folder, *options)
    assert (found["pass@1"], found["pass@2"], found["failed"], found["error"], found["timed_out"]) == (
        0.4,
        0.4,
        0.2,
        0.2,
        0.2,
    )


def test_a_program_is_the_prompt_with_the_completion_or_the_code_in_fences() -> None:
    prompt = 'import math\n\ndef f(x):\n    """Doc."""\n'
    row = GenerativeRow(prompt, [], "check(f)", "f", False, {})
    assert program_of(row, "\n    return 1") == f"{prompt}    return 1\n\ncheck(f)\n"
    whole = "Here:\n```python\ndef f(x):\n    return 1\n```\nThat is it."
    assert program_of(row, whole) == "import math\n\ndef f(x):\n    return 1\n\ncheck(f)\n"
    of_text = GenerativeRow("Write f.", [], "assert f(1)", "", False, {})
    assert program_of(of_text, "def f(x):\n    return x") == "def f(x):\n    return x\n\nassert f(1)\n"


def test_answers_are_normalized_as_in_squad_and_numbers_by_value() -> None:
    from torchmetrics.functional.text.squad import _normalize_text

    for text in (" The quick,  brown Fox. ", "an Apple a day!", "\tTHEATRE  "):
        assert normalize(text, ("case", "punctuation", "articles", "spaces")) == _normalize_text(text)
    match = ExactMatch("#### (.+)", ("number_format",))
    rows = [GenerativeRow("", ["so 1 + 1 = 2\n#### 1,200"], "", "", True, {})] * 3
    scored = match(rows, [["first #### 7\nthen #### $1200."], ["1,200"], ["#### 1200.5"]])
    assert scored.values == [[1.0], [0.0], [0.0]]
    assert scored.more == {"extracted": 2 / 3}


@pytest.mark.parametrize(
    ("rows", "options", "said"),
    [
        ([{"prompt": "a"}], (), "row 1 has no column 'answer'"),
        ([{"question": "a", "answer": []}], (), "an empty list"),
        ([{"prompt": "a", "test": " "}], ("execute_code=true",), "no test: every program would pass"),
        ([{"prompt": "a", "answer": "b"}], ("data.samples=2", "data.k=[3]"), "pass@k needs k from 1 to data.samples=2"),
        ([{"prompt": "a", "answer": "b"}], ("data.samples=2", "data.temperature=0"), "gives the same one each time"),
        ([{"prompt": "a", "answer": "b"}], ("data.extract=('",), "no regular expression"),
        ([{"prompt": "a", "answer": "b"}], ("data.extract='(a)(b)'",), "2 groups; keep one"),
        ([{"prompt": "a", "answer": "b"}], ("data.ignore=[cases]",), "data.ignore=cases: not one of case"),
        ([{"prompt": "a", "answer": "b"}], ("data.seconds=2",), "these rows have no tests"),
        ([{"prompt": "a", "answer": "b"}], ("data.stride=2",), "data.stride=2: prompts that are continued have none"),
        ([{"prompt": "a", "answer": "b"}], ("data.score=nowhere",), "name a function as module:function"),
        ([{"prompt": "a", "answer": "b"}], ("data.score=nowhere:f",), "data.score=nowhere:f: cannot be imported"),
        ([{"prompt": "a", "answer": "b"}], ("data.rubric=short",), "data.rubric is read by data.judge"),
        ([{"prompt": "a", "answer": "b"}], ("data.max_new_tokens=999999",), "leaves no room for a prompt"),
        ([{"prompt": "a", "answer": "b"}], ("data.chat=true", "data.max_new_tokens=4"), "no chat template"),
        ([{"text": "abc"}], ("data.samples=2",), "data.samples=2: has no effect: these rows are read"),
        ([{"text": "abc"}], ("data.extract=a",), "no column 'prompt' or 'question' to continue; found: text"),
        ([{"prompt": "a", "test": "b"}], ("data.extract=a",), "data.extract=a: has no effect: these rows have tests"),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_one_line(rows, options, said: str, folder: Path, command, tmp_path: Path) -> None:
    write_lines(tmp_path / "rows.jsonl", rows)
    result = command("evaluate", f"checkpoint={folder}", "data.path=rows.jsonl", *options)
    assert result.status in (1, 2), result.out
    assert result.err.count("\n") == 1, result.err
    assert said in result.err


def test_a_judge_says_how_often_it_prefers_the_completion(folder: Path, written, command, tmp_path: Path) -> None:
    # a completion that is compared with itself wins and loses in equal shares
    write_lines(tmp_path / "rows.jsonl", [{"prompt": p, "answer": t} for p, t in zip(PROMPTS, written, strict=True)])
    found = evaluate(command, folder, "data.path=rows.jsonl", f"data.judge={folder}")
    assert found["win_rate"] == 0.5
    refused = command("evaluate", f"checkpoint={folder}", "data.path=rows.jsonl", "data.judge=http://a/v1")
    assert refused.err == "error: data.judge=http://a/v1: name a model; feedback.py judges by endpoints\n"
