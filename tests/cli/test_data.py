"""python data.py: rows as a run reads them, faults by row, and tokens that train.py finds in the cache."""

import json
import os
import re
from pathlib import Path

import pytest
import yaml
from datasets import config

from genai_pl.training.trust import CONF
from tests.conftest import TINY

CHAT = ("tokenizer=byte", "model.max_seq_len=96", "picture=null")


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path.name


def alpaca(tmp_path: Path, *more: dict) -> str:
    rows = [{"instruction": f"Count to {n}.", "input": "", "output": "one two three " * n} for n in range(1, 9)]
    return write(tmp_path / "alpaca.jsonl", [*rows, *more])


def test_inspect_shows_rows_lengths_and_what_is_cut_or_repeated(command, tmp_path: Path) -> None:
    repeated = {"instruction": "Count to 1.", "input": "", "output": "one two three "}
    result = command("data", "inspect", alpaca(tmp_path, repeated), *CHAT, "rows=1")
    assert result.status == 0, result.err
    assert "data        alpaca format: 9 rows -> messages\n" in result.out
    assert (
        "<|im_start|>user\nCount to 1.<|im_end|>\n<|im_start|>assistant\n{+one two three <|im_end|>\n+}\n" in result.out
    )
    assert "duplicates  1 of 9 rows (11.11%) repeat an earlier one\n" in result.out
    assert re.search(r"cut         4 of 9 rows \(44.44%\), the first is row 5\n", result.out)
    assert "empty       0 of 9 rows" in result.out
    assert result.out.count("--- row ") == 1
    # long answers are cut in colours, too
    colored = command("data", "inspect", "alpaca.jsonl", *CHAT, "rows=8", "color=true")
    assert "\x1b[9;31m" in colored.out
    assert "\x1b[32m" in colored.out


def test_inspect_names_the_rows_that_cannot_be_read_and_shows_the_others(command, tmp_path: Path) -> None:
    name = alpaca(tmp_path, {"instruction": "x", "output": None}, {"instruction": "y", "output": True})
    cached = set(Path(config.HF_DATASETS_CACHE).rglob("*.arrow"))
    result = command("data", "inspect", name, *CHAT)
    assert result.status == 1
    assert "errors      2 rows cannot be read, and a run stops at the first:\n" in result.out
    assert "            alpaca.jsonl: row 9: column 'output': missing (null)" in result.out
    assert "row 10: column 'output': True is a boolean" in result.out
    assert "lengths     8 rows" in result.out
    assert set(Path(config.HF_DATASETS_CACHE).rglob("*.arrow")) == cached  # nothing of a part of a file is kept


def test_terminals_are_not_steered_by_the_data(command, tmp_path: Path) -> None:
    rows = [{"prompt": "a\x1b[2Jb", "completion": "c"}] * 4
    result = command("data", "inspect", write(tmp_path / "rows.jsonl", rows), *CHAT)
    assert "a\\x1b[2Jb{+c" in result.out
    assert "\x1b" not in result.out


def test_pairs_and_texts_are_inspected_by_their_columns(command, tmp_path: Path) -> None:
    pairs = [{"prompt": "Sky?", "chosen": " Blue.", "rejected": " Red."}] * 4
    result = command("data", "inspect", write(tmp_path / "pairs.jsonl", pairs), *CHAT, "rows=1")
    assert "prompt: Sky?\nchosen: {+ Blue." in result.out
    texts = [{"text": f"A text of number {n}." * 9} for n in range(9)]
    result = command(
        "data", "inspect", write(tmp_path / "texts.jsonl", texts), "tokenizer=byte", "picture=null", "rows=1", *TINY[:3]
    )
    assert result.status == 0, result.err
    assert "{+A text of number 0." in result.out


@pytest.mark.parametrize(
    ("row", "shown"),
    [
        ({"anchor": "a", "positive": "b"}, "anchor: a<|endoftext|>\npositive: b<|endoftext|>\n"),
        ({"source": "a", "target": "b"}, "source: a<|endoftext|>\ntarget: {+b<|endoftext|>+}\n"),
        ({"text": "a", "label": "x"}, "label: x\na\n"),
        ({"query": "a", "documents": ["b"], "labels": [1]}, "relevance 1: a<|endoftext|>b\n"),
        ({"tokens": ["a", "cd"], "tags": ["O", "B-X"]}, "tags: a/O cd/B-X\n{+a+} {+c+}d\n"),
    ],
    ids=["contrastive", "seq2seq", "classify", "rerank", "token_classify"],
)
def test_the_objective_follows_from_the_columns(row: dict, shown: str, command, tmp_path: Path) -> None:
    other = {"label": "y", "labels": [0]}  # a label alone teaches nothing
    rows = [{name: other.get(name, value) if n % 2 else value for name, value in row.items()} for n in range(20)]
    result = command("data", "inspect", write(tmp_path / "rows.jsonl", rows), *CHAT, "rows=1")
    assert result.status == 0, result.err
    assert shown in result.out
    assert re.search(r"duplicates  (18|19) of 20 rows", result.out)


def test_every_source_of_a_mixture_is_inspected_with_errors_of_its_own(command, tmp_path: Path) -> None:
    name = alpaca(tmp_path, {"instruction": "x", "output": None})
    write(tmp_path / "web.jsonl", [{"text": "Some words of a text. " * 9}] * 9)
    sources = f"data.sources={{web: {{path: web.jsonl, kind: text}}, talks: {{path: {name}, kind: chat}}}}"
    result = command("data", "inspect", sources, "objective=sft", *CHAT, "rows=1")
    assert result.status == 1
    assert result.out.index("source      web: text, web.jsonl\n") < result.out.index(
        "source      talks: chat, alpaca.jsonl\n"
    )
    assert result.out.count("errors      1 row cannot be read, and a run stops at it:\n") == 1
    assert result.out.count("\nlengths ") == 2
    stream = sources.replace("path: web.jsonl", "path: web.jsonl, streaming: true, val_documents: 1, weight: 1")
    result = command("data", "inspect", stream.replace("kind: chat", "kind: chat, weight: 1"), "objective=sft", *CHAT)
    assert "stream      read while it trains: inspect it as a file, without streaming\n" in result.out


def test_a_picture_needs_matplotlib_or_says_so(command, tmp_path: Path) -> None:
    result = command("data", "inspect", alpaca(tmp_path), *CHAT[:2], "rows=0")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        assert "picture     none, it is drawn with matplotlib: pip install -e '.[plots]'" in result.out
    else:
        assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")


def test_train_reads_what_prepare_has_tokenized(command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, options = alpaca(tmp_path), (*TINY, "objective=sft", "callbacks.export=false", "callbacks.checkpoint.keep=1")
    result = command("data", "prepare", name, *options)
    assert result.status == 0, result.err
    assert re.search(r"^prepared    in .* s, cached in ", result.out, re.MULTILINE)
    folder = Path(config.HF_DATASETS_CACHE) / "genai_pl"
    prepared = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    next_command = re.search(r"^next        python train\.py (.*)$", result.out, re.MULTILINE)[1]
    assert next_command.startswith(f"data.path={name} ")
    assert not os.path.exists("outputs")
    trained = command("train", *next_command.split(), "trainer.max_steps=1")
    assert trained.status == 0, trained.err
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir() if path in prepared} == prepared
    assert {path.name.partition("-")[0] for path in folder.iterdir() if path not in prepared} <= {"tokens"}


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ((), "data.py begins with what to do, inspect or prepare"),
        (("show", "rows.jsonl"), "data.py begins with what to do, inspect or prepare, not 'show'"),
        (("inspect",), "data.py inspect: give a file, folder, glob or hub name"),
        (("inspect", "nowhere.jsonl"), "nowhere.jsonl: no such file or folder"),
        (("inspect", "odd.jsonl"), "found: body; give objective=, and data.columns={prompt: NAME} or data.column="),
        (("inspect", "odd.jsonl", "objective=classify", "data.text=body"), "odd.jsonl: no column 'label'; found: body"),
        (("inspect", "odd.jsonl", "data.column=body", "data=text", "rows=-1"), "rows=-1"),
        (("prepare", "odd.jsonl", "data.column=body", "data=text", "encoders=2"), "texts are tokenized on all cores"),
        (
            ("inspect", "odd.jsonl", "data.column=body", "data=text", "colour=true"),
            "colour: no such option, did you mean color",
        ),
    ],
)
def test_a_mistake_is_one_line(words: tuple[str, ...], line: str, command, tmp_path: Path) -> None:
    write(tmp_path / "odd.jsonl", [{"body": "x"}] * 9)
    result = command("data", *words)
    assert result.status in (1, 2)
    assert line in result.err
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1


def test_the_groups_are_those_of_train_in_their_order() -> None:
    defaults = [yaml.safe_load((CONF / f"{name}.yaml").read_text())["defaults"] for name in ("config", "inspect")]
    groups = [[entry for entry in entries if isinstance(entry, dict)] for entries in defaults]
    assert [entry for entry in groups[1] if entry not in groups[0]] == [{"override hydra/hydra_logging": "none"}]
    assert [entry for entry in groups[1] if entry in groups[0]] == groups[0]  # an objective overrides what comes before


@pytest.mark.parametrize("words", [(), ("inspect",)])
def test_help_lists_the_options_of_both_tasks(words: tuple[str, ...], command) -> None:
    result = command("data", *words, "--help")
    assert result.status == 0
    for option in ("rows=3", "encoders=0", "picture=lengths.png", "data.py inspect chat.jsonl init_from=MODEL"):
        assert option in result.out


def test_a_file_of_which_no_row_can_be_read_says_why(command, tmp_path: Path) -> None:
    rows = [{"prompt": "x", "completion": None}] * 3
    result = command("data", "inspect", write(tmp_path / "rows.jsonl", rows), *CHAT)
    assert result.status == 1
    assert "rows.jsonl: row 1: column 'completion': missing (null)" in result.err
    assert result.err.endswith("(none of the 3 rows can be read)\n")
