"""Rows that train are also rows to measure on: the same examples, told by their columns."""

import json
from pathlib import Path

import pytest

from genai_pl.errors import DataError
from genai_pl.evaluation.examples import Kind, read_examples

ASKED, ANSWER = [{"role": "user", "content": "Two?"}], [{"role": "assistant", "content": "2"}]
WRONG = [{"role": "assistant", "content": "3"}]


def read(path: Path, *rows: dict) -> tuple[Kind, list[list]]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_examples(str(path))


@pytest.mark.parametrize(
    ("row", "prompt", "chosen", "rejected"),
    [
        ({"chosen": "It is blue.", "rejected": "It is green."}, "It is", " blue.", " green."),
        ({"chosen": ASKED + ANSWER, "rejected": ASKED + WRONG}, ASKED, ANSWER, WRONG),
    ],
)
def test_pairs_without_a_prompt_are_preferences(row: dict, prompt, chosen, rejected, tmp_path: Path) -> None:
    assert read(tmp_path / "rows.jsonl", row) == (Kind.preferences, [[prompt], [chosen], [rejected], [[]]])


@pytest.mark.parametrize(("beside", "answer"), [("input", "output"), ("context", "response")])
def test_instructions_are_conversations_of_the_instruction_with_its_input(
    beside: str, answer: str, tmp_path: Path
) -> None:
    rows = [{"instruction": "Add.", beside: given, answer: "3", "text": "x"} for given in ("1 2", "")]
    kind, [found] = read(tmp_path / "rows.jsonl", *rows)
    assert kind is Kind.conversations
    assert [[message["content"] for message in row.messages] for row in found] == [["Add.\n\n1 2", "3"], ["Add.", "3"]]
    assert {row.n_prompt for row in found} == {0}


def test_columns_of_two_projects_are_refused_until_they_are_named(tmp_path: Path) -> None:
    row = {"instruction": "Add.", "output": "3", "response": "4"}
    with pytest.raises(DataError, match=r"that is instructions and dolly: name the columns .* completion: NAME"):
        read(tmp_path / "rows.jsonl", row)
    named = {"prompt": "instruction", "completion": "response"}
    assert read_examples(str(tmp_path / "rows.jsonl"), columns=named) == (Kind.completions, [["Add."], ["4"]])


def test_texts_of_turns_are_preferences_in_messages(tmp_path: Path) -> None:
    row = {"chosen": "\n\nHuman: Two?\n\nAssistant: 2", "rejected": "\n\nHuman: Two?\n\nAssistant: 3"}
    assert read(tmp_path / "rows.jsonl", row) == (Kind.preferences, [[ASKED], [ANSWER], [WRONG], [[]]])


def test_turns_of_from_and_value_are_conversations_after_their_system(tmp_path: Path) -> None:
    talk = [{"from": "human", "value": "Two?"}, {"from": "gpt", "value": "2"}]
    kind, [[found]] = read(tmp_path / "rows.jsonl", {"conversations": talk, "system": "Count."})
    assert kind is Kind.conversations
    assert found.messages == [{"role": "system", "content": "Count."}, *ASKED, *ANSWER]


@pytest.mark.parametrize(("labels", "key"), [(["A", "B", "C"], "B"), (["1", "2", "3"], "2")])
def test_choices_with_labels_are_answered_by_their_label(labels: list[str], key: str, tmp_path: Path) -> None:
    row = {"question": "Which?", "choices": {"text": ["red", "3", "1"], "label": labels}, "answerKey": key}
    for name in ("rows.jsonl", "rows.parquet"):
        if name.endswith("parquet"):
            import pandas as pd

            pd.DataFrame([row]).to_parquet(tmp_path / name)
            kind, [[found]] = read_examples(str(tmp_path / name))
        else:
            kind, [[found]] = read(tmp_path / name, row)
        assert kind is Kind.choices
        assert found == ("Question: Which?\nAnswer:", ["red", "3", "1"], 1)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"answerKey": "D"}, "answer 'D' is none of the labels A, B"),
        ({"choices": {"text": ["a", "b"], "label": ["A", "A"]}}, "give each its own"),
        ({"choices": {"text": ["a", "b"]}}, "not a list"),
    ],
)
def test_choices_whose_labels_are_unclear_are_refused(change: dict, why: str, tmp_path: Path) -> None:
    row = {"question": "?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"}
    with pytest.raises(DataError, match=f"row 1.*{why}"):
        read(tmp_path / "rows.jsonl", {**row, **change})


def test_columns_of_no_kind_are_refused_with_all_kinds_that_are_known(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read(tmp_path / "rows.jsonl", {"body": "x"})
    for kind in ("text", "prompt completion", "messages", "conversations", "instruction output", "chosen rejected"):
        assert f" {kind};" in str(caught.value)
    assert "question choices answerKey" in str(caught.value)
