"""Incremental detokenization: text deltas from tokens as they arrive, and the search for stop strings in them.

Decoding tokens one by one gives wrong text: a character of several byte tokens is incomplete until its last one, and
SentencePiece drops a space at the start. Decoding the whole text at each step is right but quadratic. `Detokenizer` decodes
a short frame of recent tokens and releases only complete characters; `StopFilter` holds back what may become a stop string.
"""

from collections.abc import Sequence
from copy import copy
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FRAME = 16  # tokens in a frame before it moves: few, since each step decodes the whole frame
INCOMPLETE = "\ufffd"  # U+FFFD, which decoders return for bytes that are not (yet) a character


class Detokenizer:
    """The complete characters of a growing sequence of tokens that continues a prompt, whose own text is never released.

    Invariants: the frame `tokens` begins at a character boundary; `released` counts the characters of its text that were
    returned; `boundary` is the latest position in it where the text is complete. The frame moves to `boundary` once it is longer
    than FRAME, so the cost per token is constant.

    with_special: special tokens have their names as texts, else none
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", prompt: Sequence[int], *, with_special: bool = False
    ) -> None:
        self.tokenizer, self.with_special = tokenizer, with_special
        self.tokens = list(prompt)
        self.boundary = len(self.tokens)
        self.released = len(self._text())

    def push(self, token: int) -> str:
        """The characters that this token completes; empty for bytes in the middle of a character."""
        self.tokens.append(token)
        text = self._text()
        end = len(text.rstrip(INCOMPLETE))
        delta = text[self.released : end]
        self.released = max(self.released, end)
        if end == len(text):
            self._slide()
        return delta

    def _slide(self) -> None:
        """Note a character boundary after the last token, and drop the tokens before the previous one if the frame is long.

        The frame keeps at least one complete stretch of text before the new tokens, since their text depends on it.
        """
        if len(self.tokens) > FRAME:
            self.tokens = self.tokens[self.boundary :]
            self.released = len(self._text())
        self.boundary = len(self.tokens)

    def _text(self) -> str:
        options = {"skip_special_tokens": not self.with_special, "clean_up_tokenization_spaces": False}
        return self.tokenizer.decode(self.tokens, **options)


class StopFilter:
    """Text up to the first of the strings `stop`, which may arrive in several deltas; no part of a stop string is released.

    matched: True once a stop string is complete; nothing is released afterwards.

    >>> stop_filter = StopFilter(["END"])
    >>> [stop_filter.push(delta) for delta in ("one E", "nd two EN", "D three")], stop_filter.matched
    (['one ', 'End two ', ''], True)
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self.stop = [s for s in stop if s]
        self.buffer = ""
        self.matched = False

    def push(self, delta: str) -> str:
        """The part of the text so far, not yet released, that certainly precedes any stop string."""
        self.buffer += delta
        hits = [(i + len(s), i) for s in self.stop if (i := self.buffer.find(s)) >= 0]
        if hits:  # the first string to be complete wins, so that token boundaries make no difference
            self.matched = True
            cut = min(hits)[1]
            text, self.buffer = self.buffer[:cut], ""
            return text
        kept = max((self._overlap(s) for s in self.stop), default=0)
        cut = len(self.buffer) - kept
        text, self.buffer = self.buffer[:cut], self.buffer[cut:]
        return text

    def close(self) -> str:
        """The text held back, once no more text will come and so no stop string can be completed."""
        text, self.buffer = self.buffer, ""
        return text

    def _overlap(self, stop: str) -> int:
        """Length of the longest proper prefix of `stop` that the buffer ends with."""
        longest = min(len(stop) - 1, len(self.buffer))
        return next((n for n in range(longest, 0, -1) if self.buffer.endswith(stop[:n])), 0)


class TextStream:
    """The continuation of one prompt as text: `push` and `close` return deltas, `text` is their sum.

    tokenizer, prompt: as for `Detokenizer`. stop: stop strings. end_tokens: ids that end the text, such as eos.
    ended: True after a stop string, an end token or `close`; later tokens are ignored.
    text: the continuation so far, without the stop string. Bytes at the very end that are no complete character are left out.
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", prompt: Sequence[int], *, stop: Sequence[str], end_tokens: set[int]
    ) -> None:
        self.detokenizer = Detokenizer(tokenizer, prompt)
        self.filter = StopFilter(stop)
        self.end_tokens = end_tokens
        self.ended = False
        self.text = ""

    def push(self, token: int) -> str:
        """The delta that this token releases; empty once `ended`."""
        if self.ended:
            return ""
        if token in self.end_tokens:
            return self.close()
        delta = self.filter.push(self.detokenizer.push(token))
        self.ended = self.filter.matched
        self.text += delta
        return delta

    def fork(self) -> "TextStream":
        """A copy that may continue with other tokens, as beams with a common prefix do."""
        other = copy(self)
        other.detokenizer, other.filter = copy(self.detokenizer), copy(self.filter)
        other.detokenizer.tokens = list(self.detokenizer.tokens)
        return other

    def close(self) -> str:
        """The last delta: text that was held back, now that no token will come."""
        delta = self.filter.close()
        self.ended = True
        self.text += delta
        return delta
