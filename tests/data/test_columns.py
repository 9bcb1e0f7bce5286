"""What stands in a column becomes the same text, label or conversation from every kind of file, or one line says why not."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from genai_pl.data import byte_tokenizer, special_tokens
from genai_pl.data import chat as conversations
from genai_pl.data.chat import ChatDataModule
from genai_pl.data.columns import Place, loads, parse_degree, parse_label, parse_number, parse_text
from genai_pl.data.datamodule import RowsDataModule
from genai_pl.data.messages import common_prefix_length, extract_prompt, parse_messages
from genai_pl.data.prompt_tokens import ensure_template
from genai_pl.data.prompts import PromptsDataModule
from genai_pl.data.text import TextDataModule
from genai_pl.errors import DataError
from genai_pl.objectives import CausalLMCollator, PreferenceCollator
from genai_pl.serving.http.messages import Message
from tests.data.broken_files import collator
from tests.data.test_broken_files import LOADING, module, row_texts

HERE = Place("here.jsonl", 3, "text")
CELLS = [
    "NA",
    "null",
    "None",
    "nan",
    "007",
    "2",
    "True",
    "1.50",
    "2024-01-01",
    "2024-01-01T00:00:00Z",
    " x ",
    'a "b", c\nd',
]


def lines(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def prepared(data: RowsDataModule, collate: object = None) -> RowsDataModule:
    tokenizer = byte_tokenizer()
    if data.has_conversations():
        ensure_template(tokenizer)
    data.prepare(tokenizer, collate or collator(data.kind, special_tokens(tokenizer, len(tokenizer))))
    return data


def texts(path: object, column: str = "text") -> list[str]:
    text = {"streaming": False, "block_rows": 4, "val_documents": 1, "separate_documents": True}
    data = TextDataModule(path=str(path), column=column, **text, **{**LOADING, "seq_len": 8})
    prepared(data, CausalLMCollator())
    return ["".join(table["text"]) for table in data.documents()]


def test_every_kind_of_file_that_pandas_writes_trains_as_the_same_jsonl_does(tmp_path: Path) -> None:
    rows = [f"{cell} of {n}" for n, cell in enumerate(CELLS)]
    frame = pd.DataFrame({"text": rows, "n": range(len(rows))})
    frame.to_csv(tmp_path / "t.csv", index=False)
    frame.to_parquet(tmp_path / "t.parquet", index=False)
    frame.to_json(tmp_path / "t.jsonl", orient="records", lines=True)
    frame.to_json(tmp_path / "t.json", orient="records")
    pq.write_table(pa.table({"text": pa.array(rows).dictionary_encode()}), tmp_path / "dictionary.parquet")
    pq.write_table(pa.table({"text": pa.array(rows, pa.large_string())}), tmp_path / "large.parquet")
    found = [texts(path) for path in sorted(tmp_path.iterdir())]
    assert len(found) == 6
    assert found == [found[0]] * 6
    assert "".join(found[0]) == "".join(rows)


def test_the_cells_of_a_csv_are_texts_as_they_are_written(tmp_path: Path) -> None:
    cells = ",".join(['"NA"', "NA", "null", "nan", "None", "007", "2", "True", "1.50", "2024-01-01"])
    (tmp_path / "t.csv").write_text("prompt,completion\n" + "".join(f"{cell},{cell}\n" for cell in cells.split(",")))
    data = prepared(module("completions", tmp_path / "t.csv"))
    assert row_texts("completions", data) == [[cell.strip('"')] * 2 for cell in cells.split(",")]


def test_a_number_of_a_json_column_is_the_text_by_which_it_is_written(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text(
        "".join(f'{{"prompt": "p", "completion": {n}}}\n' for n in ("2", "1.50", "-1e3", '"x"'))
    )
    found = row_texts("completions", prepared(module("completions", tmp_path / "t.jsonl")))
    assert [completion for _, completion in found] == ["2", "1.50", "-1e3", "x"]


def test_a_column_of_iso_dates_stays_text(tmp_path: Path) -> None:
    path = lines(tmp_path / "t.jsonl", [{"text": "2024-01-01"}, {"text": "2024-02-03T04:05:06Z"}])
    assert "".join(texts(path)) == "2024-01-012024-02-03T04:05:06Z"


@pytest.mark.parametrize("value", [None, True, [], {}, b"x", float("nan"), 2.5, "\ud800"])
def test_what_is_no_text_is_refused_with_file_row_and_column(value: object) -> None:
    with pytest.raises(DataError, match=r"^here\.jsonl: row 3: column 'text': [^\n]*$"):
        parse_text(value, HERE)


def test_a_missing_document_is_refused_and_an_empty_one_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(DataError, match=r"gone\.jsonl: row 2: column 'text': missing"):
        texts(lines(tmp_path / "gone.jsonl", [{"text": "one"}, {"id": 2}, {"text": None}]))
    caplog.set_level("INFO")
    assert (
        "".join(texts(lines(tmp_path / "empty.jsonl", [{"text": "one and"}, {"text": ""}, {"text": " two"}])))
        == "one and two"
    )
    assert "1 of 3 rows" in caplog.text
    assert "first row 2" in caplog.text


LABELS = {True: [True, "true", "True", " TRUE ", 1, 1.0, "1"], False: [False, "false", "False", 0, 0.0, "0"]}


def test_labels_are_read_by_value() -> None:
    for wanted, values in LABELS.items():
        assert [parse_label(value, HERE) for value in values] == [wanted] * len(values)


@pytest.mark.parametrize("value", [None, "good", "", "yes", 2, -1, 0.5, [], "2"])
def test_a_label_that_is_unclear_is_refused(value: object) -> None:
    with pytest.raises(DataError, match=r"here\.jsonl: row 3: column 'text': .* is no label"):
        parse_label(value, HERE)


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_the_labels_of_every_kind_of_file_are_the_same(ending: str, tmp_path: Path) -> None:
    frame = pd.DataFrame(
        {"prompt": ["a", "b", "c"], "completion": ["x", "y", "z"], "label": ["false", "true", "false"]}
    )
    path = tmp_path / f"t.{ending}"
    write = {"csv": frame.to_csv, "parquet": frame.to_parquet}.get(ending)
    write(path, index=False) if write else frame.to_json(path, orient="records", lines=True)
    assert [row[-1] for row in row_texts("unpaired", module("unpaired", path))] == [False, True, False]


def test_numbers_may_be_written_as_text_and_must_be_finite() -> None:
    assert [parse_number(value, HERE) for value in ("1.5", 2, loads("1e-1"))] == [1.5, 2.0, 0.1]
    for value in ("x", None, True, "nan", float("inf"), "1_0"):
        with pytest.raises(DataError, match="is not a number"):
            parse_number(value, HERE)


@pytest.mark.parametrize(
    ("wanted", "values"),
    [
        (1.0, (True, "true", " True", "TRUE", 1, "1", "1.0", loads("1e0"))),
        (0.0, (False, "False", 0, "0", loads("-0.0"))),
    ],
)
def test_degrees_are_truth_values_or_numbers_from_0_to_1_as_values_or_text(wanted: float, values: tuple) -> None:
    assert [parse_degree(value, HERE) for value in values] == [wanted] * len(values)
    assert [parse_degree(value, HERE) for value in ("0.25", 0.25, loads("0.25"))] == [0.25] * 3
    for value in (None, "yes", "", "+", 2, "-0.5", "nan", float("inf"), [1], {"label": 1}):
        with pytest.raises(DataError, match="is no label: give a number from 0 to 1, or true or false"):
            parse_degree(value, HERE)


def test_content_in_parts_is_the_text_that_the_server_makes_of_it() -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    (message,) = parse_messages([{"role": "user", "content": parts}], HERE)
    assert message == Message(role="user", content=parts).plain()
    with pytest.raises(DataError, match="only text is read"):
        parse_messages([{"role": "user", "content": [{"type": "image", "url": "x"}]}], HERE)


CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": null}'}}
TOOL = {
    "type": "function",
    "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}},
}


def test_a_turn_of_calls_without_content_is_what_the_server_makes_of_it() -> None:
    (turn,) = parse_messages([{"role": "assistant", "tool_calls": [CALL]}], HERE)
    assert turn == Message(role="assistant", tool_calls=[CALL]).plain()
    assert turn["tool_calls"][0]["function"]["arguments"] == {"a": 1, "b": None}


def test_conversations_with_calls_are_the_same_from_jsonl_and_parquet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call, other = (
        {"type": "function", "function": {"name": name, "arguments": given}}
        for name, given in (("add", {"a": 1}), ("sub", {"b": {"c": 2}}))
    )
    rows = [
        {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "tool_calls": [used]},
                      {"role": "tool", "name": "t", "content": "3"}, {"role": "assistant", "content": "3"}], "tools": [TOOL]}
        for used in (call, other, call)
    ]  # fmt: skip
    lines(tmp_path / "t.jsonl", rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    lines(tmp_path / "text.jsonl", [{**row, "tools": json.dumps(row["tools"])} for row in rows])
    seen = []

    def encode(tokenizer: object, talks: list, given: list, *, tools: list) -> list[conversations.TokenizedExample]:
        seen.append((talks, tools))
        return [conversations.TokenizedExample(np.arange(4), np.ones(4, bool)) for _ in talks]

    monkeypatch.setattr(conversations, "encode_conversations", encode)
    for name in ("t.jsonl", "t.parquet", "text.jsonl"):
        prepared(module("chat", tmp_path / name))
    assert len(seen) == 6
    assert seen[:2] == seen[2:4] == seen[4:]
    talks, tools = seen[0]
    assert tools == [[TOOL]] * len(talks)
    assert talks[0][1] in ({"role": "assistant", "content": "", "tool_calls": [used]} for used in (call, other))


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        ("chat", {"messages": []}, "column 'messages': no messages"),
        ("chat", {"messages": None}, "column 'messages': None is not a list"),
        ("chat", {"messages": "[{'role': 'user'}]"}, "is not JSON"),
        ("chat", {"messages": [{"role": "user", "content": None}]}, "each is an object with role and content"),
        ("chat", {"messages": [{"role": "assistant", "content": "x", "weight": 0}]}, "weight 0"),
        ("completions", {"prompt": None, "completion": "x"}, "column 'prompt': missing"),
        ("completions", {"prompt": "x"}, "column 'completion': missing"),
        ("completions", {"prompt": [{"role": "user", "content": "x"}], "completion": "x"}, "give all the same way"),
        ("preference", {"prompt": "x", "chosen": None, "rejected": "y"}, "column 'chosen': missing"),
        ("unpaired", {"prompt": "x", "completion": "y", "label": "good"}, "'good' is no label"),
        ("prompts", {"prompt": None}, "column 'prompt': missing"),
        ("pairs", {"anchor": "x", "positive": True}, "True is a boolean, not text"),
        ("seq2seq", {"source": "x", "target": [1]}, "[1] is a list, not text"),
    ],
)  # fmt: skip
def test_a_row_that_says_nothing_is_one_line_with_file_and_row(
    kind: str, row: dict, message: str, tmp_path: Path
) -> None:
    from tests.data.broken_files import rows_of

    path = lines(tmp_path / "rows.jsonl", [*rows_of(kind)[:2], row])
    with pytest.raises(DataError) as caught:
        prepared(module(kind, Path(path)))
    assert f"{path}: row 3" in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


TURNS = ("user", "Sky?"), ("assistant", "Blue."), ("assistant", "Red.")
ASKED, GOOD, BAD = (
    {"role": role, "content": said} for role, said in (("user", "Sky?"), ("assistant", "Blue."), ("assistant", "Red."))
)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Sky?", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
        {"prompt": "Sky?", "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [ASKED], "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
        {"prompt": [ASKED], "chosen": "Blue.", "rejected": "Red."},
        {"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
    ],
    ids=["whole conversations", "answers as messages", "prompt said twice", "answers as texts", "no prompt"],
)
def test_preferences_are_the_same_tokens_however_prompt_and_answers_are_given(row: dict, tmp_path: Path) -> None:
    plain = {"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD]}
    collate = PreferenceCollator(vocabulary=special_tokens(byte_tokenizer(), 258))
    found, right = (
        prepared(module("preference", Path(lines(tmp_path / f"{n}.jsonl", [given] * 3))), collate).train_rows[0]
        for n, given in enumerate((row, plain))
    )
    assert {name: ids.tolist() for name, ids in found.items()} == {name: ids.tolist() for name, ids in right.items()}


def test_a_prompt_that_conversations_do_not_begin_with_is_refused() -> None:
    with pytest.raises(DataError, match=r"row 3.*do not begin with the prompt 'Sea"):
        extract_prompt("Sea?", [[ASKED, GOOD], [ASKED, BAD]], HERE)


@pytest.mark.parametrize(
    ("chosen", "rejected", "begun"),  # trl.extract_prompt's
    [
        ("It is blue.", "It is green.", 5),
        ("H: a\n\nA: yes", "H: a\n\nA: no", 8),
        ("same", "same", 3),
        ([1, 2, 3], [1, 2, 4], 2),
    ],
)
def test_the_prompt_within_two_answers_is_what_they_begin_with(chosen: list, rejected: list, begun: int) -> None:
    assert common_prefix_length([chosen, rejected]) == begun


def test_the_input_of_an_instruction_is_a_part_of_its_prompt(tmp_path: Path) -> None:
    rows = [{"instruction": "Add.", "input": given, "output": "3"} for given in ("1 2", "", "2 1")]
    names = {"messages": "messages", "prompt": "instruction", "completion": "output", "packing": True}
    data = ChatDataModule(**names, **{**LOADING, "path": lines(tmp_path / "alpaca.jsonl", rows)})
    assert row_texts("completions", data) == [["Add.\n\n1 2", "3"], ["Add.", "3"], ["Add.\n\n2 1", "3"]]


def test_turns_of_from_and_value_are_messages(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    talk = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    data = module("chat", Path(lines(tmp_path / "share.jsonl", [{"conversations": talk}] * 3)))
    assert row_texts("chat", data) == [[("user", "a"), ("assistant", "b")]] * 3
    assert "sharegpt format: 3 rows -> messages" in caplog.text
    with pytest.raises(DataError, match="from is 'narrator'"):
        parse_messages([{"from": "narrator", "value": "x"}], HERE)


def test_a_reward_gets_all_columns_as_they_are_written(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "answer": 1},
        {"prompt": "b", "answer": "2", "more": {"x": None}},
        {"prompt": "c", "tools": "t"},
    ]
    data = prepared(
        PromptsDataModule(prompt="prompt", max_prompt_len=8, **{**LOADING, "path": lines(tmp_path / "t.jsonl", rows)})
    )
    found = sorted((row["columns"] for row in [*data.train_rows, *data.val_rows]), key=lambda row: row["prompt"])
    empty = dict.fromkeys(("prompt", "answer", "more", "tools"))
    assert found == [{**empty, **row} for row in rows]


@pytest.mark.parametrize("mark", [b"PK\x03\x04", b"BZh9"])
def test_a_text_that_begins_like_an_archive_is_text_or_said_to_be_packed(mark: bytes, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_bytes(mark + b" and so on, in letters")
    assert "".join(texts(tmp_path / "t.txt")) == (mark + b" and so on, in letters").decode()
    (tmp_path / "packed.txt").write_bytes(mark + b"\xff\xfe and so on, in letters")
    with pytest.raises(DataError, match="packed by"):
        texts(tmp_path / "packed.txt")


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    for name, start in (("t.txt", ""), ("t.csv", "text\n"), ("t.jsonl", '{"text": "')):
        (tmp_path / name).write_text(
            start + "some text to read" + ('"}' if "json" in name else ""), encoding="utf-8-sig"
        )
        assert "".join(texts(tmp_path / name)) == "some text to read"


def test_a_stream_reads_the_texts_of_the_table_and_refuses_the_same_rows(tmp_path: Path) -> None:
    path = lines(tmp_path / "t.jsonl", [{"text": f"text {n}\u2028é"} for n in range(5)] + [{"text": 7}, {"text": None}])
    options = {"column": "text", "streaming": True, "block_rows": 4, "val_documents": 1, "separate_documents": True}
    rows = iter(TextDataModule(path=path, **options, **LOADING).documents()[0])
    assert [next(rows)["text"] for _ in range(5)] == [*(f"text {n}\u2028é" for n in range(1, 5)), "7"]
    with pytest.raises(DataError, match="row 7: column 'text': missing"):
        next(rows)
