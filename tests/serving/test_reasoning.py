"""Reasoning in answers: thoughts split from the answer, whatever the token boundaries and kind of markers."""

import random

import pytest

pytest.importorskip("fastapi", reason="needs pip install -e '.[serve]'")

from genai_pl.serving.engine.request import TokenOutput
from genai_pl.serving.http.reasoning import ChannelSplitter, TagSplitter, split


def outputs(*pieces: str) -> list[TokenOutput]:
    return [TokenOutput(piece, 65, None, ()) for piece in pieces]


@pytest.mark.parametrize(
    ("answer", "is_open", "thoughts", "text"),
    [
        ("<think>\nhm, a < b\n</think>\n\nYes.", False, "hm, a < b", "Yes."),
        ("hm\n</think>\n\nYes. </think>", True, "hm", "Yes. </think>"),
        ("<think>\n\n</think>\n\nYes.", False, "", "Yes."),
        ("<think>never ends </thin", False, "never ends </thin", ""),
        ("Yes <think>no</think>", False, "", "Yes <think>no</think>"),
        ("  Yes", False, "", "  Yes"),
        ("<th", False, "", "<th"),
        ("", True, "", ""),
    ],
)
def test_boundaries_of_tokens_make_no_difference(answer: str, is_open: bool, thoughts: str, text: str) -> None:
    rng = random.Random(0)
    for _ in range(30):
        cuts = sorted(rng.choices(range(len(answer) + 1), k=rng.randrange(8)))
        pieces = [answer[a:b] for a, b in zip([0, *cuts], [*cuts, len(answer)], strict=True)]
        splitter = TagSplitter("<think>", "</think>", is_open=is_open)
        assert split(outputs(*pieces), splitter)[:2] == (thoughts, text)


def test_markers_may_be_special_tokens_without_text() -> None:
    splitter = TagSplitter("[THINK]", "[/THINK]", {1: "[THINK]", 2: "[/THINK]"})
    tokens = [TokenOutput("", 1, None, ()), *outputs("h", "m"), TokenOutput("", 2, None, ()), *outputs("Yes")]
    assert split(tokens, splitter) == ("hm", "Yes", 4)


def test_channels_are_thoughts_answer_and_calls() -> None:
    ids = {name: n for n, name in enumerate(["<|channel|>", "<|message|>", "<|end|>", "<|start|>", "<|call|>"])}
    special = {n: name for name, n in ids.items()}

    def read(*pieces: str) -> tuple[str, str]:
        tokens = [TokenOutput("" if p in ids else p, ids.get(p, 99), None, ()) for p in pieces]
        return split(tokens, ChannelSplitter(special))[:2]

    head = ["<|channel|>", "analysis", "<|message|>", "h", "m", "<|end|>", "<|start|>", "assistant", "<|channel|>"]
    assert read(*head, "final", "<|message|>", "Ye", "s") == ("hm", "Yes")
    assert read(*head, "commentary", " to=functions.f", "<|message|>", "{}", "<|call|>") == ("hm", "")
    assert read(*head, "commentary", "<|message|>", "First I look.") == ("hm", "First I look.")
    assert read("plain", " text") == ("", "plain text")
