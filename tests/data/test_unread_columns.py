"""What stands beside the columns that are read: used where its meaning is plain, else named in one line."""

import csv
import json
from pathlib import Path

import pytest

from genai_pl.data import byte_tokenizer, special_tokens
from genai_pl.data.chat import ChatDataModule
from genai_pl.data.messages import prepend_system
from genai_pl.data.text import TextDataModule
from genai_pl.errors import DataError
from tests.data.broken_files import collator
from tests.data.test_broken_files import LOADING, module, row_texts
from tests.data.test_columns import HERE, lines, prepared

ASKED, ANSWER = [{"role": "user", "content": "Two?"}], [{"role": "assistant", "content": "2"}]
SAID = [("user", "Two?"), ("assistant", "2")]


def cells(path: Path, rows: list[dict]) -> Path:
    """A csv whose lists are written as JSON."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows({k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()} for row in rows)
    return path


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("completions", {"prompt": ASKED, "completion": ANSWER}),
        ("preference", {"prompt": ASKED, "chosen": ANSWER, "rejected": [{"role": "assistant", "content": "3"}]}),
        ("conversation pairs", {"chosen": ASKED + ANSWER, "rejected": [*ASKED, {"role": "assistant", "content": "3"}]}),
        ("unpaired", {"prompt": ASKED, "completion": ANSWER, "label": "true"}),
        ("prompts", {"prompt": ASKED}),
    ],
)
def test_messages_in_the_cells_of_a_csv_are_those_of_the_jsonl(kind: str, row: dict, tmp_path: Path) -> None:
    expected = row_texts(kind, module(kind, Path(lines(tmp_path / "rows.jsonl", [row] * 4))))
    assert row_texts(kind, module(kind, cells(tmp_path / "rows.csv", [row] * 4))) == expected
    assert expected[0][0] == ("user", "Two?")


def test_json_in_a_text_of_a_jsonl_stays_text_and_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    rows = [{"prompt": "a", "chosen": "[1, 2]", "rejected": "c"}] * 2
    rows += [{"prompt": "a", "chosen": json.dumps(ANSWER), "rejected": "c"}] * 2
    found = row_texts("preference", module("preference", Path(lines(tmp_path / "rows.jsonl", rows))))
    assert found[2] == ["a", json.dumps(ANSWER), "c"]
    assert [r.getMessage() for r in caplog.records if "is JSON in a text" in r.getMessage()] == [
        f"data        {tmp_path / 'rows.jsonl'}: row 3: answers is JSON in a text, and taken as that text: give a list"
    ]


def test_a_system_column_beside_conversations_is_their_first_message(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    talk = [{"from": "human", "value": "Two?"}, {"from": "gpt", "value": "2"}]
    rows = [{"system": system, "conversations": talk, "id": "7"} for system in ("Count.", "", None)]
    found = row_texts("chat", module("chat", Path(lines(tmp_path / "share.jsonl", rows))))
    assert found == [[("system", "Count."), *SAID], SAID, SAID]
    assert caplog.text.count("columns not used: id\n") == 1
    assert caplog.text.count("sharegpt format: 3 rows -> messages") == 1


def test_two_system_messages_are_refused_unless_they_are_the_same() -> None:
    begun = [{"role": "system", "content": "Count."}, *ASKED]
    assert prepend_system(begun, "Count.", HERE) == begun
    with pytest.raises(DataError, match=r"row 3.*another system message"):
        prepend_system(begun, "Sing.", HERE)


def test_a_system_column_beside_a_prompt_of_messages_is_its_first_message(tmp_path: Path) -> None:
    rows = [{"system": "Count.", "prompt": ASKED, "completion": ANSWER}] * 3
    found = row_texts("completions", module("completions", Path(lines(tmp_path / "rows.jsonl", rows))))
    assert found[0] == [("system", "Count."), *SAID]


@pytest.mark.parametrize(
    ("kind", "row", "unused"),
    [
        ("completions", {"prompt": "a", "completion": "b", "system_prompt": "c", "input": "d"}, "input, system_prompt"),
        (
            "completions",
            {"instruction": "a", "output": "b", "input": "", "system": "c", "history": [], "text": "d"},
            "text",
        ),
        ("preference", {"prompt": "a", "chosen": "b", "rejected": "c", "system": "d", "id": 1}, "id, system"),
        ("unpaired", {"prompt": "a", "completion": "b", "label": True, "two\nlines": 1}, "two lines"),
        ("prompts", {"prompt": "a", "answer": "b"}, None),
        ("completions", {"prompt": "a", "completion": "b"}, None),
    ],
)
def test_columns_that_are_not_used_are_one_sorted_line_of_each_file(
    kind: str, row: dict, unused: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = Path(lines(tmp_path / "rows.jsonl", [row] * 4))
    for _ in range(2):  # also where the rows were read before
        caplog.clear()
        caplog.set_level("INFO")
        module(kind, path).tables()
        found = [r.getMessage() for r in caplog.records if "not used" in r.getMessage()]
        assert found == ([] if unused is None else [f"data        {path}: columns not used: {unused}"])


def test_the_context_of_an_instruction_is_a_part_of_its_prompt(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    rows = [{"instruction": "Who?", "context": text, "response": "He."} for text in ("He sings.", "", "He is.")]
    names = {"messages": "messages", "prompt": "instruction", "completion": "response", "packing": True}
    data = ChatDataModule(path=lines(tmp_path / "dolly.jsonl", rows), **names, **LOADING)
    assert row_texts("completions", data) == [["Who?\n\nHe sings.", "He."], ["Who?", "He."], ["Who?\n\nHe is.", "He."]]
    assert "not used" not in caplog.text


def test_an_error_in_the_rows_to_validate_on_names_their_file(tmp_path: Path) -> None:
    good = lines(tmp_path / "train.jsonl", [{"prompt": "a"}] * 3)
    (tmp_path / "val").mkdir()
    lines(tmp_path / "val" / "a.jsonl", [{"prompt": "a"}])
    lines(tmp_path / "val" / "b.jsonl", [{"prompt": "a"}, {"prompt": ""}])
    data = module("prompts", Path(good))
    data.val_source = module("prompts", tmp_path / "val").source
    with pytest.raises(DataError, match=r"val/b\.jsonl: row 2: an empty prompt"):
        prepared(data)


def test_a_conversation_that_a_template_refuses_names_the_file_it_is_in(tmp_path: Path) -> None:
    good = lines(tmp_path / "train.jsonl", [{"messages": ASKED + ANSWER}] * 3)
    bad = lines(tmp_path / "val.jsonl", [{"messages": ASKED + ANSWER}, {"messages": ANSWER + ASKED}])
    names = {name: name for name in ("messages", "prompt", "completion")}
    data = ChatDataModule(path=good, packing=True, **names, **{**LOADING, "val_path": bad})
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0].role != 'user' %}{{ raise_exception('begin with the user') }}{% endif %}"
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
    )
    with pytest.raises(DataError, match=r"val\.jsonl: row 2: .*begin with the user"):
        data.prepare(tokenizer, collator("chat", special_tokens(tokenizer, len(tokenizer))))


@pytest.mark.parametrize("role", ["bot", "Assistant"])
def test_roles_that_no_template_knows_are_named_where_nothing_is_learned(role: str, tmp_path: Path) -> None:
    rows = [{"messages": [*ASKED, {"role": role, "content": "2"}]}] * 3
    with pytest.raises(DataError, match=f"has anything to learn.*'{role}'.*'user'; only what 'assistant' says"):
        prepared(module("chat", Path(lines(tmp_path / "rows.jsonl", rows))))


def test_a_stream_that_validates_on_all_documents_names_the_option(tmp_path: Path) -> None:
    path = lines(tmp_path / "rows.jsonl", [{"text": "a"}] * 3)
    options = {"column": "text", "streaming": True, "block_rows": 4, "separate_documents": True}
    with pytest.raises(DataError, match=r"data\.val_documents=3: .* has 3 documents"):
        TextDataModule(path=path, val_documents=3, **options, **LOADING).documents()
    train, val = TextDataModule(path=path, val_documents=2, **options, **LOADING).documents()
    assert (len(list(train)), len(val)) == (1, 2)
