"""Rows that repeat an earlier one are left out: exactly by their cells, nearly by the shingles that they share."""

import random
from itertools import combinations
from pathlib import Path

import pytest
from datasets import Dataset

from genai_pl.data import duplicates
from genai_pl.data.duplicates import THRESHOLD, shingles, similarity, unique_rows, without_duplicates
from genai_pl.errors import ConfigError
from tests.data.test_columns import lines
from tests.data.test_formats import cells, chat

WORDS = [f"w{n}" for n in range(500)]


def test_equal_rows_are_found_in_all_columns_but_the_number() -> None:
    rows = [("a", "x"), ("a", "y"), ("a", "x"), ("ax", ""), ("a", "y")]
    table = Dataset.from_dict({"prompt": [a for a, _ in rows], "completion": [b for _, b in rows], "row": [*range(5)]})
    assert unique_rows([table]).tolist() == [0, 1, 3]
    assert unique_rows([table, table]).tolist() == [0, 1, 3]


def test_duplicates_are_left_out_before_rows_are_held_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    rows = [{"prompt": f"{n % 4}", "completion": "x"} for n in range(12)]
    path = lines(tmp_path / "rows.jsonl", rows)
    data = chat(path, deduplicate="exact", val_fraction=0.5)
    assert sorted(row["prompt"] for row in cells(data, "prompt")) == ["0", "1", "2", "3"]
    assert f"{path}: 8 of 12 rows are exact duplicates: left out" in caplog.text
    assert len(cells(chat(path), "prompt")) == 12


def test_an_unknown_mode_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.deduplicate=fuzzy: one of null, exact, near"):
        chat(lines(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}]), deduplicate="fuzzy")


def test_the_keys_of_messages_are_no_words() -> None:
    cell = '[{"role": "user", "content": "one two three"}, {"role": "assistant", "content": "four five six"}]'
    assert shingles([cell]) == {
        "user one two three assistant", "one two three assistant four", "two three assistant four five",
        "three assistant four five six",
    }  # fmt: skip


def test_near_duplicates_are_those_of_all_pairs_compared() -> None:
    pytest.importorskip("rensa")
    rng = random.Random(0)
    texts = [" ".join(rng.choices(WORDS, k=200)) for _ in range(20)]
    for n, changed in enumerate((1, 2, 1, 2, 1, 8, 9, 10, 11, 12)):  # words of 200, each in five shingles
        words = texts[n].split()
        for place in rng.sample(range(200), changed):
            words[place] = "changed"
        texts.append(" ".join(words))
    # brute force: a row is left out if an earlier one that is kept is as similar as the threshold
    sets, expected = [shingles([text]) for text in texts], []
    for n, words in enumerate(sets):
        if all(similarity(words, sets[other]) < THRESHOLD for other in expected):
            expected.append(n)
    assert 20 < len(expected) < 30
    near = [similarity(sets[a], sets[b]) for a, b in combinations(range(30), 2)]
    assert not any(THRESHOLD <= value < 0.85 for value in near)  # where MinHash may miss one
    table = Dataset.from_dict({"text": texts})
    assert without_duplicates(table, "near", name="t")["text"][:] == [texts[n] for n in expected]


def test_near_duplicates_without_the_library_name_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "rensa", None)
    with pytest.raises(ConfigError, match=r"pip install -e '\.\[dedup\]'"):
        duplicates.check_mode("near")
