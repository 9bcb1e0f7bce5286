"""Files broken in 300 ways: either each row says what Python's own modules read in it, or one line says why not."""

import json
from collections import Counter
from pathlib import Path

import pytest

from genai_pl.data import byte_tokenizer, special_tokens
from genai_pl.data.chat import ChatDataModule
from genai_pl.data.datamodule import RowsDataModule
from genai_pl.data.pairs import PairsDataModule
from genai_pl.data.preference import PreferenceDataModule
from genai_pl.data.prompt_tokens import ensure_template
from genai_pl.data.prompts import PromptsDataModule
from genai_pl.data.seq2seq import Seq2SeqDataModule
from genai_pl.data.text import TextDataModule
from genai_pl.data.unpaired import UnpairedDataModule
from genai_pl.errors import ConfigError, DataError
from tests.conftest import TINY
from tests.data import broken_files

LOADING = {
    "val_path": None, "val_fraction": 0.2, "seq_len": 4096, "batch_size": 2, "val_batch_size": None, "workers": 0,
    "shuffle": True, "seed": 0,
}  # fmt: skip
OBJECTIVES = {
    "chat": "sft", "completions": "sft", "preference": "dpo", "conversation pairs": "dpo", "unpaired": "kto", "text": "clm",
}  # fmt: skip


def module(kind: str, path: Path) -> RowsDataModule:
    """The data module that reads a kind of data."""
    options = {"path": str(path), **LOADING}
    if kind == "text":
        text = {"column": "text", "streaming": False, "block_rows": 4, "val_documents": 1, "separate_documents": True}
        return TextDataModule(**text, **{**options, "seq_len": 8})
    if kind in ("chat", "completions"):
        return ChatDataModule(messages="messages", prompt="prompt", completion="completion", packing=True, **options)
    if kind in ("preference", "conversation pairs"):
        names = {name: name for name in ("prompt", "chosen", "rejected", "completions")}
        return PreferenceDataModule(**names, margin=None, **options)
    if kind == "unpaired":
        return UnpairedDataModule(prompt="prompt", completion="completion", label="label", **options)
    if kind == "prompts":
        return PromptsDataModule(prompt="prompt", max_prompt_len=64, **options)
    if kind == "pairs":
        return PairsDataModule(anchor="anchor", positive="positive", negative=None, **options)
    return Seq2SeqDataModule(source="source", target="target", packing=True, **options)


def row_texts(kind: str, data: RowsDataModule) -> list:
    """What the rows of a data module say, in the order of the file."""
    if kind == "text":
        return ["".join(text for table in data.documents() for text in table["text"])]
    rows = sorted((row for table in data.tables() for row in table), key=lambda row: row["row"])
    return [flat(kind, row) for row in rows]


def flat(kind: str, row: dict) -> list:
    if kind in ("pairs", "seq2seq"):
        return [row[role] for role in row if role != "row"]
    parts = {role: json.loads(cell) for role, cell in row.items() if role not in ("row", "label")}
    if kind == "chat":
        return plain(parts["messages"])
    if kind == "conversation pairs":
        return [*plain(parts["prompt"]), *map(plain, parts["answers"])]
    label = [row["label"]] if "label" in row else []
    answers = [text for answer in parts.get("answers", []) for text in plain(answer)]
    return [*plain(parts["prompt"]), *answers, *plain(parts.get("completion", [])), *label]


def plain(given: str | list) -> list:
    return [given] if isinstance(given, str) else [(message["role"], message["content"]) for message in given]


def outcome(kind: str, path: Path) -> str:
    """`refused` with one line, `equal` to the independent reading, or else what is wrong."""
    try:
        data = module(kind, path)
        found = row_texts(kind, data)
        tokenizer = byte_tokenizer()
        if data.has_conversations():
            ensure_template(tokenizer)
        data.prepare(tokenizer, broken_files.collator(kind, special_tokens(tokenizer, len(tokenizer))))
    except (DataError, ConfigError) as error:
        return "refused" if "\n" not in str(error) and len(str(error)) < 500 else f"not a line: {error}"
    try:
        rows = [broken_files.expected(kind, row) for row in broken_files.read(path)]
    except Exception as error:
        return f"{type(error).__name__} is read as {found}"
    expected = ["".join(row[0] for row in rows)] if kind == "text" else rows
    return "equal" if found == expected else f"{found} instead of {expected}"


def outcomes(numbers: range, folder: Path) -> Counter[str]:
    counts: Counter[str] = Counter()
    for number in numbers:
        kind, path = broken_files.broken(number, folder)
        found = outcome(kind, path)
        counts[found] += 1
        assert found in ("equal", "refused"), f"{number}: {kind} in {path}: {found}"
    return counts


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet"])
@pytest.mark.parametrize("kind", broken_files.KINDS)
def test_good_files_of_every_kind_say_what_other_readers_read(kind: str, ending: str, tmp_path: Path) -> None:
    rows = broken_files.rows_of(kind)
    if ending == "csv" and kind == "chat":
        rows = [{"messages": json.dumps(row["messages"])} for row in rows]
    if ending == "csv" and kind == "conversation pairs":
        pytest.skip("a csv holds no lists where a text may stand")
    broken_files.write(tmp_path / f"good.{ending}", rows)
    assert outcome(kind, tmp_path / f"good.{ending}") == "equal"


def test_broken_files_are_read_as_others_read_them_or_refused_in_one_line(tmp_path: Path) -> None:
    counts = outcomes(range(40), tmp_path)
    assert counts["equal"] >= 5
    assert counts["refused"] >= 10


@pytest.mark.slow
def test_files_broken_in_300_ways_are_read_as_others_read_them_or_refused_in_one_line(tmp_path: Path) -> None:
    counts = outcomes(range(300), tmp_path)
    print(dict(counts))
    assert sum(counts.values()) == 300
    assert counts["equal"] >= 60


@pytest.mark.parametrize("number", [0, 2, 4, 7, 9])
def test_a_broken_file_gets_the_command_to_train_or_to_say_one_line(number: int, command, tmp_path: Path) -> None:
    kind, path = broken_files.broken(number, tmp_path)
    result = command(
        "train", f"objective={OBJECTIVES.get(kind, 'sft')}", *TINY, "model.max_seq_len=96", f"data.path={path}",
        "data.val_fraction=0.4", "trainer.max_steps=1", "callbacks.export=false", "trainer.limit_val_batches=0",
    )  # fmt: skip
    refused = result.status in (1, 2) and result.err.count("\n") == 1 and result.err.startswith("error: ")
    assert result.status == 0 or refused, result.err
