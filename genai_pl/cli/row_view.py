"""A row of tokens on the terminal: learned, given and cut parts in colours, or in marks where there are none."""

import sys
import textwrap
from typing import TYPE_CHECKING

from genai_pl.data.inspection import CUT, GIVEN, LEARNED, InspectedRow, Part, runs_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COLORS = {GIVEN: ("\x1b[2m", "\x1b[0m"), LEARNED: ("\x1b[32m", "\x1b[0m"), CUT: ("\x1b[9;31m", "\x1b[0m")}
MARKS = {GIVEN: ("", ""), LEARNED: ("{+", "+}"), CUT: ("[-", "-]")}
NAMES = {LEARNED: "learned", GIVEN: "given", CUT: "cut"}


def row_lines(row: InspectedRow, tokenizer: "PreTrainedTokenizerBase", *, width: int, color: bool | None) -> list[str]:
    """A heading, and a line for each part of a row; width: characters of a part. color: None on a terminal."""
    signs = _signs(color)
    lines = [f"--- row {row.number:,}: {row.length:,} tokens"]
    lines += [textwrap.shorten(printable(row.note), width, placeholder=" ...")] if row.note else []
    for part in row.parts:
        label = "" if part.label == "text" else f"{part.label}: "
        lines.append(label + _text(part, tokenizer, width, signs))
    return lines


def legend(*, color: bool | None) -> str:
    """The line that explains the signs."""
    signs = _signs(color)
    return "--- " + ", ".join(f"{signs[state][0]}{name}{signs[state][1]}" for state, name in NAMES.items())


def _signs(color: bool | None) -> dict[int, tuple[str, str]]:
    """What stands before and after a run of tokens of each state."""
    return COLORS if (sys.stdout.isatty() if color is None else color) else MARKS


def _text(part: Part, tokenizer: "PreTrainedTokenizerBase", width: int, signs: dict[int, tuple[str, str]]) -> str:
    """The text of a part, each run of one state within its signs; the middle of long runs is left out."""
    runs = list(runs_of(part.states))
    room = max(width // max(len(runs), 1), 40)
    shown = []
    for state, start, stop in runs:
        text = printable(tokenizer.decode(part.ids[start:stop].tolist()))
        if len(text) > room:
            left_out = f" ... {len(text) - room:,} characters ... "
            text = text[: room // 2] + left_out + text[len(text) - room // 2 :]
        before, after = signs[state]
        shown.append(f"{before}{text}{after}")
    return "".join(shown)


def printable(text: str) -> str:
    r"""The text without characters that steer a terminal, which data of strangers may hold.

    >>> printable("a\x1b[2Jb\n")
    'a\\x1b[2Jb\n'
    """
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)
