"""Reasoning in answers: what a model thinks before it answers, split from the answer as its tokens arrive.

Templates write thoughts in two ways: between two markers at the beginning of a turn (<think> of Qwen3 and DeepSeek, [THINK] of
Mistral), or in a channel of their own (gpt-oss). Which of them a model writes is found from its chat template. Markers may be
plain text or special tokens, which the text of an answer lacks; so a splitter reads tokens beside their text.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from genai_pl.serving.engine.request import TokenOutput

TAGS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<seed:think>", "</seed:think>"))
CHANNEL, MESSAGE = "<|channel|>", "<|message|>"  # of gpt-oss: <|channel|>NAME<|message|>TEXT<|end|><|start|>assistant
STARTS = ("<|start|>", "<|end|>", "<|call|>", "<|return|>")  # after these the header of a message follows
TAIL = 24  # last tokens of a prompt in which its template may open the thoughts


class SplitText(NamedTuple):
    """New characters of the thoughts and of the answer."""

    reasoning: str = ""
    text: str = ""


class TagSplitter:
    """Thoughts between two markers at the beginning of an answer; an answer that begins otherwise has none.

    opening, closing: the markers. special: text of markers that are special tokens, by token id.
    is_open: the prompt ends with the opening marker, so the answer begins with thoughts.

    Spaces and line breaks around the thoughts are dropped. Without a closing marker all of the answer is thoughts.

    >>> splitter = TagSplitter("<think>", "</think>")
    >>> splitter.feed("<think>hm</th"), splitter.feed("ink>\\n\\nYes"), splitter.close()
    (SplitText(reasoning='hm', text=''), SplitText(reasoning='', text='Yes'), SplitText(reasoning='', text=''))
    """

    def __init__(
        self, opening: str, closing: str, special: dict[int, str] | None = None, *, is_open: bool = False
    ) -> None:
        self.opening, self.closing, self.special = opening, closing, special or {}
        self.state = "reasoning" if is_open else "start"
        self.buffer = ""  # characters whose side is not known yet
        self.has_thoughts = is_open
        self.begun = False  # a character other than a space has come on this side of a marker

    def push(self, output: "TokenOutput") -> SplitText:
        """The thoughts and text that a token completes."""
        return self.feed(self.special.get(output.token, "") + output.text)

    def feed(self, text: str) -> SplitText:
        """The thoughts and text that more text completes."""
        self.buffer += text
        reasoning = ""
        if self.state == "start":
            start = self.buffer.lstrip()
            if start.startswith(self.opening):
                self.state, self.buffer, self.has_thoughts = "reasoning", start[len(self.opening) :], True
            elif not self.opening.startswith(start):
                self.state, self.begun = "text", True
        if self.state == "reasoning":
            before, found, after = self.buffer.partition(self.closing)
            if found:
                reasoning, self.state, self.buffer = self._begin(before.rstrip()), "text", after
                self.begun = False
            else:
                reasoning = self._release(before)
        text = ""
        if self.state == "text":
            text, self.buffer = self._begin(self.buffer), ""
        return SplitText(reasoning, text)

    def close(self) -> SplitText:
        """What was held back, at the end of the answer."""
        rest, self.buffer = self.buffer, ""
        return SplitText(self._begin(rest).rstrip(), "") if self.state == "reasoning" else SplitText("", rest)

    def _release(self, text: str) -> str:
        """Thoughts that certainly precede the closing marker; trailing spaces and a possible marker stay in the buffer."""
        n = next((k for k in range(len(self.closing) - 1, 0, -1) if text.endswith(self.closing[:k])), 0)
        kept = text[: len(text) - n].rstrip()
        self.buffer = text[len(kept) :]
        return self._begin(kept)

    def _begin(self, text: str) -> str:
        """The text, without spaces at the beginning of its side."""
        text = text if self.begun else text.lstrip()
        self.begun = self.begun or bool(text)
        return text


class ChannelSplitter:
    """Thoughts in the channel `analysis`; calls of functions (`to=NAME` in the header) are neither thoughts nor answer.

    special: texts of the markers, which are special tokens, by token id. An answer that begins without a header is plain.
    """

    def __init__(self, special: dict[int, str]) -> None:
        self.special = special
        self.header: str | None = ""  # None within a message
        self.side = "text"
        self.is_first = True

    def push(self, output: "TokenOutput") -> SplitText:
        """The thoughts and text that a token completes."""
        marker, is_first, self.is_first = self.special.get(output.token), self.is_first, False
        if marker == CHANNEL or marker in STARTS:
            in_message, self.header = self.header is None, ""
            # an end token releases text that was held back for a stop string
            return self._on_side(output.text) if in_message else SplitText()
        if marker == MESSAGE and self.header is not None:
            name = self.header.split()[0] if self.header.split() else ""
            called = "to=" in self.header
            self.side, self.header = ("call" if called else "reasoning" if name == "analysis" else "text"), None
        elif is_first and marker is None:
            self.header = None
        if self.header is not None:
            self.header += output.text
            return SplitText()
        return self._on_side(output.text)

    def _on_side(self, text: str) -> SplitText:
        return SplitText() if self.side == "call" else SplitText(**{self.side: text})

    def close(self) -> SplitText:
        """Nothing: no character is held back."""
        return SplitText()


Splitter = TagSplitter | ChannelSplitter


class Reasoning:
    """How a model writes its thoughts, by its chat template.

    make: a splitter for the answer to a prompt of these tokens; None where the template knows no thoughts.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.tokenizer = tokenizer
        template = str(tokenizer.chat_template or "")
        self.has_channels = CHANNEL in template
        self.tags = next((pair for pair in TAGS if pair[1] in template), None)
        markers = (CHANNEL, MESSAGE, *STARTS) if self.has_channels else self.tags or ()
        special = set(tokenizer.all_special_ids) | {
            token for token, added in tokenizer.added_tokens_decoder.items() if added.special
        }
        ids = tokenizer.convert_tokens_to_ids(list(markers))
        self.special = {token: marker for token, marker in zip(ids, markers, strict=True) if token in special}

    @property
    def is_known(self) -> bool:
        """True for a template with thoughts."""
        return self.has_channels or self.tags is not None

    def make(self, prompt: "tuple[int, ...]") -> Splitter | None:
        """A splitter for one answer to the prompt."""
        if self.has_channels:
            return ChannelSplitter(self.special)
        if self.tags is None:
            return None
        end = self.tokenizer.decode(list(prompt[-TAIL:]), skip_special_tokens=False).rstrip()
        return TagSplitter(*self.tags, self.special, is_open=end.endswith(self.tags[0]))


MakeSplitter = Callable[[], Splitter | None]


def split(outputs: "list[TokenOutput]", splitter: Splitter | None) -> tuple[str, str, int]:
    """(thoughts, answer, number of the first token of the answer) of a whole answer."""
    if splitter is None:
        return "", "".join(output.text for output in outputs), 0
    reasoning, text, first = [], [], 0
    for n, output in enumerate(outputs):
        if isinstance(splitter, TagSplitter) and splitter.state != "text":
            first = n + 1
        split_text = splitter.push(output)
        reasoning.append(split_text.reasoning)
        text.append(split_text.text)
        if split_text.reasoning:
            first = n + 1
    if isinstance(splitter, TagSplitter) and not splitter.has_thoughts:
        first = 0
    split_text = splitter.close()
    return "".join([*reasoning, split_text.reasoning]), "".join([*text, split_text.text]), first
