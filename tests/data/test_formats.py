"""Data sets in the columns of other projects: told by their names, read as TRL's functions and published cards read them."""

import json
import re
from pathlib import Path

import pytest
from trl.data_utils import extract_prompt, maybe_convert_to_chatml

from genai_pl.data import formats
from genai_pl.data.chat import ChatDataModule
from genai_pl.data.messages import parse_messages
from genai_pl.data.preference import PreferenceDataModule
from genai_pl.data.prompts import PromptsDataModule
from genai_pl.data.unpaired import UnpairedDataModule
from genai_pl.errors import ConfigError, DataError
from tests.data.test_broken_files import LOADING, module
from tests.data.test_columns import HERE, lines, prepared

CHAT = {"messages": "messages", "prompt": "prompt", "completion": "completion", "packing": True}
PAIRS = {name: name for name in ("prompt", "chosen", "rejected", "completions")}


def chat(path: str, **options: object) -> ChatDataModule:
    return ChatDataModule(**{**CHAT, **LOADING, "path": path, **options})


def preference(path: str, **options: object) -> PreferenceDataModule:
    return PreferenceDataModule(**PAIRS, margin=None, **{**LOADING, "path": path, **options})


def cells(data, *roles: str) -> list[dict]:
    """The parsed cells of the roles in all rows, in the order of the file."""
    rows = sorted((row for table in data.tables() for row in table), key=lambda row: row["row"])
    return [{role: json.loads(row[role]) for role in roles} for row in rows]


def format_lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if " format: " in r.getMessage()]


def test_alpaca_rows_are_messages_and_the_line_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    # the three cases of the card of tatsu-lab/alpaca, and LLaMA-Factory's system and history
    rows = [
        {"instruction": "Give three tips.", "input": "", "output": "1. Eat.", "text": "Below is ..."},
        {"instruction": "Classify.", "input": "Cricket", "output": "Sport"},
        {"instruction": "And?", "output": "No.", "system": "Be brief.", "history": [["Hi", "Hello"]]},
    ]
    found = cells(chat(lines(tmp_path / "alpaca.jsonl", rows)), "messages")
    assert [[(m["role"], m["content"]) for m in row["messages"]] for row in found] == [
        [("user", "Give three tips."), ("assistant", "1. Eat.")],
        [("user", "Classify.\n\nCricket"), ("assistant", "Sport")],
        [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "And?"), ("assistant", "No.")],
    ]
    assert format_lines(caplog) == ["data        alpaca format: 3 rows -> messages"]


def test_share_gpt_rows_are_what_trl_makes_of_them_with_the_roles_of_templates(tmp_path: Path) -> None:
    talk = [{"from": who, "value": text} for who, text in (("system", "Count."), ("human", "Two?"), ("gpt", "2"))]
    (row,) = cells(chat(lines(tmp_path / "share.jsonl", [{"conversations": talk}] * 2)), "messages")[:1]
    expected = maybe_convert_to_chatml({"conversations": [dict(turn) for turn in talk]})
    roles = {"human": "user", "gpt": "assistant"}
    assert row["messages"] == [{**turn, "role": roles.get(turn["role"], turn["role"])} for turn in expected["messages"]]
    # role and content under `conversations`
    spoken = [{"role": "user", "content": "Two?"}, {"role": "assistant", "content": "2"}]
    found = cells(chat(lines(tmp_path / "named.jsonl", [{"conversations": spoken}] * 2)), "messages")
    assert found == [{"messages": maybe_convert_to_chatml({"conversations": spoken})["messages"]}] * 2


def test_conversations_without_messages_are_left_out_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    talk = [{"from": "human", "value": "Two?"}, {"from": "gpt", "value": "2"}]
    rows = [{"conversations": given} for given in (talk, [], talk, [{"from": "human", "value": "And?"}], talk)]
    data = prepared(chat(lines(tmp_path / "a.jsonl", rows), val_path=lines(tmp_path / "b.jsonl", rows)))
    assert "2 of 5 training examples have nothing to learn: left out" in caplog.text
    assert sum(map(len, data.train_rows.bins)) == 3


def test_calls_and_observations_of_share_gpt_are_tool_calls_and_the_turns_of_tools() -> None:
    call = {"name": "add", "arguments": {"a": 1}}
    asked = {"from": "function_call", "value": json.dumps(call)}
    both = {"from": "function_call", "value": json.dumps([call, {"name": "sub", "arguments": "{}"}])}
    seen = {"from": "observation", "value": "3"}
    one, two, answer = parse_messages([asked, both, seen], HERE)
    assert one == {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]}
    assert [c["function"]["name"] for c in two["tool_calls"]] == ["add", "sub"]
    assert answer == {"role": "tool", "content": "3"}
    for value in ("add(1)", "[3]", '{"arguments": {}}'):
        with pytest.raises(DataError, match="row 3"):
            parse_messages([{"from": "function_call", "value": value}], HERE)


def test_parts_of_chat_completions_and_of_responses_are_joined_and_images_refused() -> None:
    parts = [{"type": "input_text", "text": "a"}, {"type": "text", "text": "b"}]
    said = {"role": "assistant", "content": [{"type": "output_text", "text": "c"}]}
    assert [m["content"] for m in parse_messages([{"role": "user", "content": parts}, said], HERE)] == ["ab", "c"]
    for part in (
        {"type": "image_url", "image_url": {"url": "x"}},
        {"type": "input_audio", "input_audio": {"data": "x"}},
        {"type": "input_image", "text": "x"},
    ):
        with pytest.raises(DataError, match=rf"row 3.*of type '{part['type']}'.*only text is read"):
            parse_messages([{"role": "user", "content": [part]}], HERE)


BEGUN = "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Why\nso?\n\nAssistant: I "
HH = [
    ("\n\nHuman: Sky?\n\nAssistant: Blue.", "\n\nHuman: Sky?\n\nAssistant: Red."),
    (f"{BEGUN}think", f"{BEGUN}know"),
    ("\n\nHuman: Sky?\n\nAssistant: ", "\n\nHuman: Sky?\n\nAssistant: Red."),
]  # fmt: skip


def turns(text: str) -> list[dict]:
    """The turns of a text of HH, by the regular expression of TRL's script for the data set."""
    parts = re.split(r"(\n\nAssistant: |\n\nHuman: )", text)[1:]
    speakers = {"\n\nHuman: ": "user", "\n\nAssistant: ": "assistant"}
    return [{"role": speakers[who], "content": said} for who, said in zip(parts[::2], parts[1::2], strict=True)]


def test_texts_of_human_and_assistant_are_the_pairs_that_trl_extracts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    rows = [{"chosen": chosen, "rejected": rejected} for chosen, rejected in HH]
    expected = [extract_prompt({role: turns(row[role]) for role in row}) for row in rows]
    found = cells(preference(lines(tmp_path / "hh.jsonl", rows)), "prompt", "answers")
    assert found == [{"prompt": row["prompt"], "answers": [row["chosen"], row["rejected"]]} for row in expected]
    assert format_lines(caplog) == ["data        hh format: 3 rows -> prompt, chosen, rejected"]
    # with the prompt in a column of its own, the format has to be asked for
    begun = [{"prompt": "\n\nHuman: Sky?\n\nAssistant:", "chosen": " Blue.", "rejected": " Red."}] * 2
    path = lines(tmp_path / "begun.jsonl", begun)
    assert cells(preference(path, format="hh"), "prompt", "answers") == [found[0]] * 2
    assert cells(preference(path), "prompt")[0] == {"prompt": begun[0]["prompt"]}


def test_a_row_of_hh_without_turns_is_one_line(tmp_path: Path) -> None:
    rows = [{"chosen": HH[0][0], "rejected": HH[0][1]}, {"chosen": "Blue.", "rejected": "Red."}]
    with pytest.raises(DataError, match=r"row 2: column 'chosen': 'Blue\.' does not begin with '\\n\\nHuman:'"):
        preference(lines(tmp_path / "hh.jsonl", rows)).tables()


def test_texts_of_turns_stay_texts_where_that_is_asked_for(tmp_path: Path) -> None:
    rows = [{"chosen": HH[0][0], "rejected": HH[0][1]}] * 2
    data = preference(lines(tmp_path / "hh.jsonl", rows), format="preference-without-prompt")
    expected = extract_prompt(rows[0])  # of texts
    answers = [expected["chosen"], expected["rejected"]]
    assert cells(data, "prompt", "answers")[0] == {"prompt": expected["prompt"], "answers": answers}


def test_renamed_columns_are_read_and_errors_name_those_of_the_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    rows = [{"question": f"{n}?", "answer": f"{n}", "prompt": "hidden"} for n in range(3)]
    names = {"prompt": "question", "completion": "answer"}
    path = lines(tmp_path / "qa.jsonl", rows)
    found = cells(chat(path, columns=names), "prompt", "completion")
    assert found == [{"prompt": row["question"], "completion": row["answer"]} for row in rows]
    assert format_lines(caplog)[0].endswith(
        "3 rows -> prompt, completion; answer read as completion; question read as prompt"
    )
    bad = lines(tmp_path / "bad.jsonl", [*rows, {"question": None, "answer": "x"}])
    with pytest.raises(DataError, match=r"row 4: column 'question': missing"):
        chat(bad, columns=names).tables()
    with pytest.raises(
        DataError, match=r"data\.columns\.prompt=quest: no such column; found: question, answer, prompt"
    ):
        chat(path, columns={"prompt": "quest"})


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_renaming_is_the_same_in_every_kind_of_file(ending: str, tmp_path: Path) -> None:
    import pandas as pd

    frame = pd.DataFrame({"q": ["a", "b", "c"], "a": ["x", "y", "z"], "id": [1, 2, 3]})
    path = tmp_path / f"rows.{ending}"
    write = {"csv": frame.to_csv, "parquet": frame.to_parquet}.get(ending)
    write(path, index=False) if write else frame.to_json(path, orient="records", lines=True)
    found = cells(chat(str(path), columns={"prompt": "q", "completion": "a"}), "prompt", "completion")
    assert found == [{"prompt": q, "completion": a} for q, a in zip("abc", "xyz", strict=True)]


def test_another_name_for_a_column_is_another_cache_entry(tmp_path: Path) -> None:
    path = lines(tmp_path / "qa.jsonl", [{"a": f"{n}a", "b": f"{n}b", "completion": "x"} for n in range(3)])
    first, second = (cells(chat(path, columns={"prompt": name}), "prompt")[0]["prompt"] for name in "ab")
    assert (first, second) == ("0a", "0b")


@pytest.mark.parametrize(
    ("kind", "row", "line"),
    [
        (
            "chat",
            {"question": "a", "answer": "b"},
            r"no column 'prompt'; found: question, answer \(set data.prompt\); no format",
        ),
        (
            "preference",
            {"prompt": "a", "better": "b"},
            r"no column 'chosen'; found: prompt, better .*no format .*\(set data\.columns=\{chosen",
        ),
        ("unpaired", {"prompt": "a", "completion": "b"}, r"known: kto \(prompt, completion, label\)"),
        ("prompts", {"question": "a"}, r"known: prompts \(prompt\); instructions \(instruction\)"),
    ],
)
def test_columns_of_no_format_are_one_line_with_what_is_known(kind: str, row: dict, line: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=line) as caught:
        module(kind, Path(lines(tmp_path / "rows.jsonl", [row] * 3))).tables()
    assert "data.columns={" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_columns_of_two_formats_are_refused_until_one_is_chosen(tmp_path: Path) -> None:
    row = {
        "instruction": "a",
        "output": "b",
        "conversations": [{"from": "human", "value": "c"}, {"from": "gpt", "value": "d"}],
    }
    path = lines(tmp_path / "rows.jsonl", [row] * 2)
    with pytest.raises(
        DataError, match=r"that is the format sharegpt and alpaca: choose one with data\.format=sharegpt"
    ):
        chat(path).tables()
    assert cells(chat(path, format="alpaca"), "messages")[0]["messages"][0]["content"] == "a"
    assert cells(chat(path, format="sharegpt"), "messages")[0]["messages"][0]["content"] == "c"
    with pytest.raises(ConfigError, match=r"data\.format=alpacca: no format of data=chat; known: auto, messages"):
        chat(path, format="alpacca").tables()
    with pytest.raises(
        DataError, match=r"data\.format=dolly needs the column 'response'; found: .*columns=\{response: NAME"
    ):
        chat(path, format="dolly").tables()


def test_instructions_are_prompts_of_one_message(tmp_path: Path) -> None:
    rows = [{"instruction": "Add.", "input": "1 2", "output": "3"}] * 3
    data = PromptsDataModule(
        prompt="prompt", max_prompt_len=64, **{**LOADING, "path": lines(tmp_path / "a.jsonl", rows)}
    )
    assert cells(data, "prompt")[0] == {"prompt": [{"role": "user", "content": "Add.\n\n1 2"}]}


def test_the_documented_formats_are_those_of_the_table() -> None:
    folder = Path(__file__).parents[2]
    for kind, forms in formats.FORMATS.items():
        page = (folder / "docs/data.md").read_text()
        assert all(f"`{form.name}`" in page for form in forms)
        if len(forms) == 1:  # nothing to choose
            continue
        (line,) = [
            row for row in (folder / f"conf/data/{kind}.yaml").read_text().splitlines() if row.startswith("format:")
        ]
        assert line.partition("columns: ")[2].partition(";")[0] == ", ".join(form.name for form in forms)


def test_a_sharegpt_prompt_with_single_messages_for_answers_is_a_pair(tmp_path: Path) -> None:
    row = {
        "conversations": [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "Sky?"}],
        "chosen": {"from": "gpt", "value": "Blue."},
        "rejected": {"role": "assistant", "content": "Red."},
    }
    found = cells(preference(lines(tmp_path / "pairs.jsonl", [row] * 3)), "prompt", "answers")[0]
    assert found["prompt"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Sky?"}]
    assert found["answers"] == [[{"role": "assistant", "content": text}] for text in ("Blue.", "Red.")]


def test_the_last_message_of_a_labelled_conversation_is_its_completion(tmp_path: Path) -> None:
    asked, answer = {"role": "user", "content": "Sky?"}, {"role": "assistant", "content": "Blue."}
    names = {name: name for name in ("prompt", "completion", "label")}
    rows = [{"messages": [asked, answer], "label": n == 0} for n in range(3)]
    data = UnpairedDataModule(**names, **{**LOADING, "path": lines(tmp_path / "kto.jsonl", rows)})
    found = cells(data, "prompt", "completion")
    assert found[0] == {"prompt": [asked], "completion": [answer]}
    path = lines(tmp_path / "asked.jsonl", [{"messages": [answer, asked], "label": True}] * 3)
    with pytest.raises(DataError, match=r"row 1: column 'messages': messages: the last is the assistant's answer"):
        UnpairedDataModule(**names, **{**LOADING, "path": path}).tables()


MEDIA_ROWS = [
    ("images", ["a.jpg"], {"messages": [{"role": "user", "content": "<image>Who?"}, {"role": "assistant", "content": "A"}]}),
    ("videos", ["a.mp4"], {"conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "A"}]}),
    ("image", "a.jpg", {"instruction": "Who is it?", "output": "A"}),
    ("audios", ["a.wav"], {"prompt": "What is said?", "completion": "A"}),
]  # fmt: skip


@pytest.mark.parametrize(("column", "value", "row"), MEDIA_ROWS, ids=[column for column, _, _ in MEDIA_ROWS])
def test_a_row_with_something_to_see_or_hear_is_refused_and_one_without_trains(
    column: str, value: object, row: dict, tmp_path: Path
) -> None:
    empty = type(value)()
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({**row, column: cell}) + "\n" for cell in (empty, None, empty, value)))
    with pytest.raises(DataError, match=rf"row 4: column '{column}': .*only text is read; leave the row out"):
        chat(str(path)).tables()
    path.write_text("".join(json.dumps({**row, column: cell}) + "\n" for cell in (empty, None, empty)))
    assert len(cells(chat(str(path)), *({"messages", "completion"} & {*chat(str(path)).tables()[0].column_names}))) == 3


def test_turns_with_a_weight_of_the_loss_are_learned_as_they_say_or_refused() -> None:
    parts = [{"type": "text", "value": "a"}, {"type": "text", "value": "b"}]

    def message(role: str, weight: float) -> dict:
        return {"role": role, "content": parts, "loss_weight": weight}

    parsed = parse_messages([message("user", 0.0), message("assistant", 1.0)], HERE)
    assert parsed == [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "ab"}]
    for role, weight in (("user", 1.0), ("assistant", 0.0), ("assistant", 0.5)):
        with pytest.raises(DataError, match=f"loss_weight {weight} of the role {role}: every answer is learned"):
            parse_messages([message(role, weight)], HERE)
