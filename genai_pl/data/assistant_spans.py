"""Where assistants speak in the text of a conversation: found by rendering it in parts, or with other words in a turn."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from genai_pl.errors import DataError

if TYPE_CHECKING:
    from genai_pl.data.chat_template import ChatTemplate

Message = Mapping[str, object]  # role, content, and perhaps tool_calls, reasoning_content, ...
Messages = Sequence[Message]
Tools = Sequence[Mapping[str, object]]  # JSON schemas of functions that may be called

# two answers without a common first or last letter: where renderings of both differ, an answer begins and ends
PROBES = ("qzxjvk", "kvjxzq")
PROBE_QUESTION = {"role": "user", "content": PROBES[0]}
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
MARKER = re.compile(r"<[^<>\s]{1,60}>|\[[^\[\]\s]{1,30}\]")  # what markers of turns look like, special tokens or not
ATOM = re.compile(rf"{MARKER.pattern}|\s+|\w+|.")


def assistant_span(
    template: "ChatTemplate", text: str, messages: Messages, n: int, tools: Tools, lowest: int
) -> tuple[int, int]:
    """Where turn n stands in the text, not before `lowest`."""
    span = _prefix_span(template, text, messages, n, tools) or _probed_span(template, text, messages, n, tools, lowest)
    if span is None or not lowest <= span[0] < span[1]:
        raise DataError(f"messages: the chat template does not show where turn {n + 1}, an assistant's, stands")
    return span


def _prefix_span(
    template: "ChatTemplate", text: str, messages: Messages, n: int, tools: Tools
) -> tuple[int, int] | None:
    """Where turn n stands if what is rendered before and up to it are beginnings of the text; None otherwise."""
    said = text if n == len(messages) - 1 else template.try_render(messages[: n + 1], tools)
    if not n or said is None or not text.startswith(said):
        return None
    asked = template.try_render(messages[:n], tools, add_generation_prompt=True)
    return None if asked is None or not said.startswith(asked) else (len(asked), len(said))


def _probed_span(
    template: "ChatTemplate", text: str, messages: Messages, n: int, tools: Tools, lowest: int
) -> tuple[int, int] | None:
    """Where turn n stands, found by writing other words in its place; None if they leave no trace."""
    before, after = messages[:n], messages[n + 1 :]
    probes = [_with_probe(messages[n], words) for words in PROBES]
    first, other = (template.render([*before, probe, *after], tools) for probe in probes)
    if first == other:
        return None
    n_before = min(_n_common(first, other), _n_common(text, first))
    n_after = _n_common(first[::-1], other[::-1])
    if n_after and not text.endswith(first[-n_after:]):
        return None
    start, said_until = _header_end(template, text, before, tools, lowest, n_before), len(text) - n_after
    if not after:
        return start, len(text)
    # what follows the words when nothing follows the turn is its end, as far as the text agrees
    alone = template.try_render([*before, probes[0]], tools) or ""
    return start, said_until + _n_common_markers(text[said_until:], alone.rpartition(PROBES[0])[2])


def _header_end(template: "ChatTemplate", text: str, before: Messages, tools: Tools, lowest: int, highest: int) -> int:
    """Where the generation prompt, or as much of it as stands there, ends between two places of the text."""
    before = before or [PROBE_QUESTION]  # nothing asks for a first turn: take another's header
    asked, plain = template.try_render(before, tools, add_generation_prompt=True), template.try_render(before, tools)
    if asked is None or plain is None:
        return highest
    prompt = asked[_n_common_markers(asked, plain) :]
    shortest = next((match.end() for match in MARKER.finditer(prompt)), len(prompt))
    for end in reversed([match.end() for match in ATOM.finditer(prompt) if match.end() >= shortest]):
        place = text.rfind(prompt[:end], lowest, highest)
        if place >= 0:
            return place + end
    return highest


def include_end_token(special: re.Pattern[str], text: str, end: int) -> int:
    """The end of a turn, with the special token that follows where none closes it: the next turn's, in some templates."""
    said = text[:end].rstrip()
    if any(match.end() == len(said) for match in special.finditer(said, max(0, len(said) - 64))):
        return len(text[:end].rstrip(" "))  # a space after the end may be one token with what others say next
    following = special.match(text, end)
    return end if following is None else following.end()


def _with_probe(message: Message, words: str) -> dict[str, object]:
    """The turn with other words wherever it has some, so that they are the first and the last thing that varies."""
    changed = {**message, **{name: words for name in REASONING_KEYS if message.get(name)}}
    calls = message.get("tool_calls")
    if not calls or message.get("content"):
        changed["content"] = words
    if calls:
        function = calls[-1].get("function", calls[-1])
        arguments = {"words": words}
        as_text = isinstance(function.get("arguments"), str)
        changed["tool_calls"] = [
            *calls[:-1],
            with_arguments(calls[-1], json.dumps(arguments) if as_text else arguments),
        ]
    return changed


def with_arguments(call: Mapping[str, object], arguments: object) -> dict[str, object]:
    """The call, of a function in it or with its name beside, with other arguments."""
    if "function" not in call:
        return {**call, "arguments": arguments}
    return {**call, "function": {**call["function"], "arguments": arguments}}


def _n_common(a: str, b: str) -> int:
    """How many characters both begin with."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[:middle] == b[:middle] else (low, middle - 1)
    return low


def _n_common_markers(a: str, b: str) -> int:
    """The same, but no marker of either is cut in two."""
    n = _n_common(a, b)
    if n in (len(a), len(b)):
        return n
    cuts = [m.start() for text in (a, b) for m in MARKER.finditer(text, max(0, n - 64)) if m.start() < n < m.end()]
    return min([n, *cuts])
