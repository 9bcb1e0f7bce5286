"""Assistant spans: the characters of a rendered conversation that an assistant's turn occupies.

A chat template is a Jinja program that returns text, not spans, and most templates mark nothing in it. The span of turn
n is found from outside, by rendering, in one of two ways:

1. Prefixes. If the rendering of messages[:n] with a generation prompt is a prefix of the whole text, and so is that of
   messages[: n + 1], the turn is the text between their ends. Most templates are of this kind.
2. Probes. Some templates write a turn differently once others follow it (Qwen3 drops earlier thoughts). Then the turn
   is rendered twice with two words that share no letter at either end: the first and the last character where both
   renderings differ are the first and the last of its content, and the header and the end marker around it are added.

A template in which neither leads to a span raises DataError: a wrong loss mask would train silently on the user's turns.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from genai_pl.errors import DataError

if TYPE_CHECKING:
    from genai_pl.data.chat_template import ChatTemplate

Message = Mapping[str, object]  # role, content, and perhaps tool_calls, reasoning_content, ...
Messages = Sequence[Message]
Tools = Sequence[Mapping[str, object]]  # JSON schemas of the functions that the assistant may call

# two contents without a common first or last letter: renderings of both differ from their first to their last letter
PROBES = ("qzxjvk", "kvjxzq")
PROBE_QUESTION = {"role": "user", "content": PROBES[0]}
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
MARKER = re.compile(r"<[^<>\s]{1,60}>|\[[^\[\]\s]{1,30}\]")  # what markers of turns look like, special tokens or not
QUOTES = re.compile(r"[^\w\s]{0,8}")  # of a text among arguments
ATOM = re.compile(rf"{MARKER.pattern}|\s+|\w+|.")


def assistant_span(
    template: "ChatTemplate", text: str, messages: Messages, n: int, tools: Tools, min_start: int
) -> tuple[int, int]:
    """Start and end of turn n in the text, not before `min_start`; DataError if no rendering shows them."""
    span = _prefix_span(template, text, messages, n, tools) or _probed_span(
        template, text, messages, n, tools, min_start
    )
    if span is None or not min_start <= span[0] < span[1]:
        raise DataError(f"messages: the chat template does not show where turn {n + 1}, an assistant's, stands")
    return span


def _prefix_span(
    template: "ChatTemplate", text: str, messages: Messages, n: int, tools: Tools
) -> tuple[int, int] | None:
    """The span of turn n between two prefixes of the text; None if either rendering is no prefix of it.

    The last turn ends with the text, so it needs no second rendering.
    """
    rendered = text if n == len(messages) - 1 else template.try_render(messages[: n + 1], tools)
    if not n or rendered is None or not text.startswith(rendered):
        return None
    opened = template.try_render(messages[:n], tools, add_generation_prompt=True)
    return None if opened is None or not rendered.startswith(opened) else (len(opened), len(rendered))


def _probed_span(
    template: "ChatTemplate", text: str, messages: Messages, n: int, tools: Tools, min_start: int
) -> tuple[int, int] | None:
    """The span of turn n by rendering probes in its place; None if the template drops its content.

    `text` itself takes part in the comparison: its own content may begin like a probe.
    """
    # render the conversation with each probe in place of the turn
    before, after = messages[:n], messages[n + 1 :]
    probes = [_with_probe(messages[n], probe_text) for probe_text in PROBES]
    first, other = (template.render([*before, probe, *after], tools) for probe in probes)
    if first == other:
        return None
    # the common prefix and suffix of the renderings surround the content
    n_before = min(_n_common(first, other), _n_common(text, first))
    n_after = _n_common(first[::-1], other[::-1])
    n_shared = min(n_after, _n_common(text[::-1], first[::-1]))
    # the probe is text, and the last argument may be no text: then a quotation mark at most is not shared
    quotes = first[len(first) - n_after : len(first) - n_shared]
    if QUOTES.fullmatch(quotes) is None:
        return None
    # before the content the turn has its header, after it an end marker
    start, content_end = _header_end(template, text, before, tools, min_start, n_before), len(text) - n_shared
    if start is None:  # no generation prompt to go by
        start = min(n_before, _content_start(template, text, messages, n, tools)) if calls_of(messages[n]) else n_before
    if not after:
        return start, len(text)
    # the end marker is what follows the probe when the turn is the last one, as far as the text agrees
    alone = (template.try_render([*before, probes[0]], tools) or "").rpartition(PROBES[0])[2]
    return start, content_end + _n_common_markers(text[content_end:], alone.removeprefix(quotes))


def _content_start(template: "ChatTemplate", text: str, messages: Messages, n: int, tools: Tools) -> int:
    """Where turn n begins, a call: where the text would go on if it were a plain answer; len(text) if that shows nothing.

    What answers the call is left out up to the next question, as templates refuse answers to no call.
    """
    following = next((k for k in range(n + 1, len(messages)) if messages[k]["role"] == "user"), len(messages))
    plain = [{"role": messages[n]["role"], "content": probe_text} for probe_text in PROBES]
    renderings = [template.try_render([*messages[:n], turn, *messages[following:]], tools) for turn in plain]
    if None in renderings or renderings[0] == renderings[1]:
        return len(text)
    return min(_n_common_markers(*renderings), _n_common_markers(text, renderings[0]))


def _header_end(
    template: "ChatTemplate", text: str, before: Messages, tools: Tools, min_start: int, max_end: int
) -> int | None:
    """Where the header of an assistant's turn ends in text[min_start:max_end]: after as much of the generation prompt as
    occurs there; None where nothing of it does.

    The generation prompt is what the template appends for `add_generation_prompt`. A turn with content may have only its
    beginning (a template that opens `<think>` for a new answer does not repeat that before an old one), so ever shorter
    prefixes of the prompt are searched, down to its first marker.
    """
    # the generation prompt: what the template adds to these messages on request
    before = before or [PROBE_QUESTION]  # a first turn has no prompt: take the header of another
    opened, plain = template.try_render(before, tools, add_generation_prompt=True), template.try_render(before, tools)
    if opened is None or plain is None:
        return None
    prompt = opened[_n_common_markers(opened, plain) :]
    # its longest prefix that occurs in the text, not shorter than its first marker
    shortest = next((match.end() for match in MARKER.finditer(prompt)), len(prompt))
    for end in reversed([match.end() for match in ATOM.finditer(prompt) if match.end() >= shortest]):
        start = text.rfind(prompt[:end], min_start, max_end)
        if start >= 0:
            return start + end
    return None


def include_end_token(special: re.Pattern[str], text: str, end: int) -> int:
    """The end of a turn, moved after the special token that closes it.

    A span that already ends with a special token keeps it, without the spaces after it: such a space may be one token with
    the first word of the next turn. Otherwise a special token that follows directly is included; in some templates that
    token opens the next turn, and it is what the model must produce to stop.
    """
    turn = text[:end].rstrip()
    # 64 characters hold the longest special token
    if any(match.end() == len(turn) for match in special.finditer(turn, max(0, len(turn) - 64))):
        return len(text[:end].rstrip(" "))  # a space may be one token with the next turn
    following = special.match(text, end)
    return end if following is None else following.end()


def _with_probe(message: Message, probe: str) -> dict[str, object]:
    """The message with the probe as its content, its reasoning and the arguments of its last call, where it has these.

    The probe must be the first and the last part that varies, whatever the template writes first.
    """
    changed = {**message, **{name: probe for name in REASONING_KEYS if message.get(name)}}
    calls = calls_of(message)
    if not calls or message.get("content"):
        changed["content"] = probe
    if calls:
        function = calls[-1].get("function", calls[-1])
        arguments = {"words": probe}
        as_text = isinstance(function.get("arguments"), str)
        changed["tool_calls"] = [
            *calls[:-1],
            with_arguments(calls[-1], json.dumps(arguments) if as_text else arguments),
        ]
    return changed


def calls_of(message: Message) -> Sequence[Mapping[str, object]]:
    """The tool calls of a message, none by default."""
    return message.get("tool_calls") or ()


def with_arguments(call: Mapping[str, object], arguments: object) -> dict[str, object]:
    """The call with other arguments; its function is nested under `function` (OpenAI) or is the call itself."""
    if "function" not in call:
        return {**call, "arguments": arguments}
    return {**call, "function": {**call["function"], "arguments": arguments}}


def _n_common(a: str, b: str) -> int:
    """The length of the common prefix, by binary search: slices compare in C, characters in Python would not.

    >>> _n_common("abcd", "abxd")
    2
    """
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[:middle] == b[:middle] else (low, middle - 1)
    return low


def _n_common_markers(a: str, b: str) -> int:
    """The length of the common prefix, shortened so that it splits no marker of either text.

    >>> _n_common_markers("x<|im_start|>", "x<|im_end|>")
    1
    """
    n = _n_common(a, b)
    if n in (len(a), len(b)):
        return n
    starts = [m.start() for text in (a, b) for m in MARKER.finditer(text, max(0, n - 64)) if m.start() < n < m.end()]
    return min([n, *starts])
