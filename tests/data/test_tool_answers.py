"""Answers with turns of tools in preferences: what a tool said is read, and counts in no likelihood."""

from pathlib import Path

import pytest
import torch

from genai_pl.data import byte_tokenizer, special_tokens
from genai_pl.objectives import IGNORED, PreferenceCollator, UnpairedPreferenceCollator
from tests.data.test_columns import lines, module, prepared

USER = {"role": "user", "content": "Weather?"}
CHOSEN = [
    {"role": "assistant", "content": "I look."},
    {"role": "tool", "content": "31 degrees"},
    {"role": "assistant", "content": "Hot."},
]
SHORT = [{"role": "assistant", "content": "No idea."}]


def counted(batch: dict[str, torch.Tensor]) -> list[str]:
    """The texts of the labels of each row."""
    tokenizer = byte_tokenizer()
    rows = [[int(token) for token in row if 0 <= token < 256] for row in batch["labels"]]
    return [tokenizer.decode(row) for row in rows]


def data_of(kind: str, path: Path, rows: list[dict]) -> object:
    lines(path, rows)
    tokenizer = byte_tokenizer()
    vocabulary = special_tokens(tokenizer, len(tokenizer))
    collate = {"preference": PreferenceCollator, "unpaired": UnpairedPreferenceCollator}[kind](vocabulary=vocabulary)
    return prepared(module(kind, path), collate)


def test_likelihoods_of_a_pair_leave_out_what_a_tool_said(tmp_path: Path) -> None:
    rows = [{"prompt": [USER], "chosen": CHOSEN, "rejected": SHORT}] * 4
    data = data_of("preference", tmp_path / "pairs.jsonl", rows)
    [row, *_] = data.train_rows
    batch = data.collate([row, row])
    for text in counted(batch):
        assert "I look." in text
        assert "Hot." in text
        assert "No idea." in text
        assert "31 degrees" not in text
        assert "Weather?" not in text
    said = bytes(token for token in batch["input_ids"][0].tolist() if token < 256).decode()
    assert said.index("I look.") < said.index("31 degrees") < said.index("Hot.")


def test_likelihoods_of_labelled_answers_leave_out_what_a_tool_said(tmp_path: Path) -> None:
    rows = [{"prompt": [USER], "completion": CHOSEN if n % 2 else SHORT, "label": n % 2 == 1} for n in range(6)]
    data = data_of("unpaired", tmp_path / "liked.jsonl", rows)
    chosen = next(row for row in data.train_rows if row["label"])
    short = next(row for row in data.train_rows if not row["label"])
    texts = counted(data.collate([chosen, short]))
    assert [("Hot." in text, "No idea." in text) for text in texts] == [
        (True, False),
        (False, True),
        (False, True),
        (True, False),
    ]
    assert not any("31 degrees" in text for text in texts)


@pytest.mark.parametrize("kind", ["preference", "unpaired"])
def test_answers_of_the_assistant_alone_have_no_mask(kind: str, tmp_path: Path) -> None:
    given = {"chosen": SHORT, "rejected": CHOSEN[:1]} if kind == "preference" else {"completion": SHORT, "label": True}
    data = data_of(kind, tmp_path / "rows.jsonl", [{"prompt": [USER], **given}] * 4)
    assert not any("mask" in name for row in data.train_rows for name in row)
    batch = data.collate(list(data.train_rows)[:2])
    assert (batch["labels"] != IGNORED).any()
