"""The core set: the same questions everywhere, and centered accuracies by hand."""

import hashlib
import json
import math
from pathlib import Path

import pytest
import torch

from genai_pl.evaluation.choices import Question
from genai_pl.evaluation.core import core_metrics
from genai_pl.evaluation.core_questions import TASKS

CHECKSUM = "726311c0d4b8135f"  # of all questions


def test_the_questions_are_the_published_ones_with_one_right_choice_of_four_each() -> None:
    every = {name: make() for name, make in TASKS.items()}
    assert {name: len(questions) for name, questions in every.items()} == dict.fromkeys(every, 100) | {"sentences": 40}
    for questions in every.values():
        assert len({question.prompt for question in questions}) == len(questions)
        assert all(len(set(question.choices)) == 4 for question in questions)
        # the right choice is in every place about equally often
        places = [question.answer for question in questions]
        assert all(places.count(place) > len(places) / 10 for place in range(4))
    assert hashlib.sha256(json.dumps(every).encode()).hexdigest()[:16] == CHECKSUM


def test_right_choices_are_right() -> None:
    closing = dict(zip("([{<", ")]}>", strict=True))
    for question in TASKS["addition"]():
        a, _, b, _ = question.prompt.splitlines()[-1].split()
        assert int(question.choices[question.answer]) == int(a) + int(b)
    for question in TASKS["brackets"]():
        stack: list[str] = []
        for sign in question.prompt.splitlines()[1].split():
            assert sign in closing or closing[stack.pop()] == sign
            stack += [sign] if sign in closing else []
        assert question.choices[question.answer] == closing[stack[-1]]
    for question in TASKS["spelling"]():
        letters = question.prompt.split(". ")[1].split()[0].replace("-", "")
        assert question.choices[question.answer] == letters
    for question in TASKS["copying"]():
        listed, again = (part.split() for part in question.prompt.split(" . "))
        assert question.choices[question.answer] == listed[len(again)]


def test_the_length_of_a_choice_tells_nothing() -> None:
    """Always the shortest choice, or always the longest one, is right about as often as by guessing."""
    for questions in (make() for make in TASKS.values()):
        for pick in (min, max):
            shares = []
            for question in questions:
                sizes = [len(choice) for choice in question.choices]
                shares.append((sizes[question.answer] == pick(sizes)) / sizes.count(pick(sizes)))
            assert 0.17 < sum(shares) / len(shares) < 0.33


def test_centered_accuracy_is_nothing_for_guessing_and_one_for_all_right() -> None:
    right = [Question("", ["a", "b", "c", "d"], n % 4) for n in range(8)]
    losses = torch.ones(8, 4)
    losses[range(8), [n % 4 for n in range(8)]] = 0
    # the first choice always: a quarter is right
    first = torch.ones(8, 4)
    first[:, 0] = 0
    questions = {"known": right, "guessed": right}
    found = core_metrics(torch.cat([losses.flatten(), first.flatten()]), questions)
    assert (found["known"], found["guessed"], found["centered_accuracy"]) == (
        1.0,
        pytest.approx(0.0),
        pytest.approx(0.5),
    )
    # Agresti and Coull: two right and two wrong are added to 8 of 8, and to 2 of 8
    variance = sum(p * (1 - p) / 12 / 0.75**2 for p in (10 / 12, 4 / 12)) / 4
    assert found["centered_accuracy_high"] - found["centered_accuracy"] == pytest.approx(1.959964 * math.sqrt(variance))


def test_the_set_has_a_name_that_a_file_of_ones_own_takes_over(folder: Path, command, tmp_path: Path) -> None:
    result = command("evaluate", f"checkpoint={folder}", "data.path=core", "limit=2", "out=figures.json")
    assert result.status == 0, result.err
    figures = json.loads(Path("figures.json").read_text())
    assert figures["rows"] == 20
    assert figures["centered_accuracy"] == pytest.approx(sum(figures[name] for name in TASKS) / 10)
    refused = command("evaluate", f"checkpoint={folder}", "data.path=core", "data.samples=2")
    assert "data.samples=2: has no effect: data.path=core is multiple choice" in refused.err
    (tmp_path / "core").mkdir()
    (tmp_path / "core" / "a.txt").write_text("text")
    assert "bpb" in command("evaluate", f"checkpoint={folder}", "data.path=core").out
