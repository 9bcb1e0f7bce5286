"""Rows that were hardly meant are counted, and named by their number in the file."""

from pathlib import Path

from tests.cli.test_data import CHAT, write


def said(output: str) -> list[str]:
    return [line.removeprefix("data        ") for line in output.splitlines() if "first row" in line]


def test_empty_answers_of_alpaca_are_counted(command, tmp_path: Path) -> None:
    rows = [{"instruction": f"Say {n}.", "input": "", "output": str(n)} for n in range(20)]
    rows[6]["output"], rows[9]["output"] = "", "\n"
    result = command("data", "inspect", write(tmp_path / "rows.jsonl", rows), *CHAT, "rows=1")
    assert said(result.out) == ["2 of 20 rows of rows.jsonl have an empty answer in messages, first row 7"], result.err


def test_equal_answers_are_counted_by_their_rows_in_a_file_with_unreadable_ones(command, tmp_path: Path) -> None:
    rows = [{"prompt": f"{n}?", "chosen": f"{n}!", "rejected": "no"} for n in range(20)]
    rows[3]["chosen"] = True
    rows[8]["rejected"] = rows[8]["chosen"]
    result = command("data", "inspect", write(tmp_path / "rows.jsonl", rows), "objective=dpo", *CHAT, "rows=1")
    assert said(result.out) == [
        "1 of 19 rows of rows.jsonl have equal chosen and rejected answers, which teach nothing, first row 9"
    ], result.err
