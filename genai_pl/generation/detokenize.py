"""Text out of tokens, as they come."""

from collections.abc import Sequence
from copy import copy
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FRAME = 16  # tokens decoded together before the offset moves: few, as each step decodes them all
INCOMPLETE = "\ufffd"  # what decoders write for bytes that are not (yet) a character


class Detokenizer:
    """Complete characters of a growing row of tokens, which continue the text of a prompt.

    Tokens are decoded from an offset that slides along, never one by one: what a token adds depends on its
    neighbours (a space that SentencePiece drops at the start, a character of several byte tokens).
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", prompt: Sequence[int]) -> None:
        self.tokenizer = tokenizer
        self.tokens = list(prompt)  # the frame; it begins and, for a prompt, ends with a complete character
        self.boundary = len(self.tokens)  # the text of the frame up to here ends in a complete character
        self.released = len(self._text())  # characters of the frame that were given out

    def push(self, token: int) -> str:
        """The characters that became complete with this token; special tokens have no text."""
        self.tokens.append(token)
        text = self._text()
        end = len(text.rstrip(INCOMPLETE))
        delta = text[self.released : end]
        self.released = max(self.released, end)
        if end == len(text):
            self._slide()
        return delta

    def _slide(self) -> None:
        if len(self.tokens) > FRAME:
            self.tokens = self.tokens[self.boundary :]
            self.released = len(self._text())
        self.boundary = len(self.tokens)

    def _text(self) -> str:
        return self.tokenizer.decode(self.tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class StopFilter:
    """Text up to the first of some strings, which may arrive in pieces; nothing of a stop string passes."""

    def __init__(self, stop: Sequence[str]) -> None:
        self.stop = [s for s in stop if s]
        self.buffer = ""
        self.matched = False

    def push(self, delta: str) -> str:
        """The text that certainly stands before any stop string."""
        self.buffer += delta
        hits = [(i + len(s), i) for s in self.stop if (i := self.buffer.find(s)) >= 0]
        if hits:  # the string that is complete first, so that the borders of tokens make no difference
            self.matched = True
            cut = min(hits)[1]
            text, self.buffer = self.buffer[:cut], ""
            return text
        kept = max((self._overlap(s) for s in self.stop), default=0)
        cut = len(self.buffer) - kept
        text, self.buffer = self.buffer[:cut], self.buffer[cut:]
        return text

    def close(self) -> str:
        """What was held back and turned out not to be a stop string."""
        text, self.buffer = self.buffer, ""
        return text

    def _overlap(self, stop: str) -> int:
        longest = min(len(stop) - 1, len(self.buffer))
        return next((n for n in range(longest, 0, -1) if self.buffer.endswith(stop[:n])), 0)


class TextStream:
    """The continuation of one prompt as text: `push` and `close` return what may be shown, `text` is the sum of it.

    Bytes at the very end that are no complete character are left out.
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
        """The text that this token sets free: none once a stop string or an end token has set `ended`."""
        if self.ended:
            return ""
        if token in self.end_tokens:
            return self.close()
        delta = self.filter.push(self.detokenizer.push(token))
        self.ended = self.filter.matched
        self.text += delta
        return delta

    def fork(self) -> "TextStream":
        """A stream of the same text, which may go on with other tokens."""
        other = copy(self)
        other.detokenizer, other.filter = copy(self.detokenizer), copy(self.filter)
        other.detokenizer.tokens = list(self.detokenizer.tokens)
        return other

    def close(self) -> str:
        """The rest, once no token will come."""
        delta = self.filter.close()
        self.ended = True
        self.text += delta
        return delta
