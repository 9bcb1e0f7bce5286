"""Answers in the words of OpenAI's API, whole and in pieces."""

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from genai_pl.serving.answer_streams import Answer
    from genai_pl.serving.engine.request import Piece

Json = dict[str, object]
Decode = Callable[[int], str]
LEAST = -9999.0  # what OpenAI writes for a token that cannot come: JSON has no infinity


def header(kind: str, name: str) -> Json:
    """What every answer, and every piece of a stream, begins with."""
    prefix = "cmpl" if kind == "text_completion" else "chatcmpl"
    return {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": name}


def usage(n_prompt: int, answers: "Sequence[Answer]") -> Json:
    """Tokens read and written; a prompt counts once, however many answers it has."""
    written = sum(answer.n_generated for answer in answers)
    return {"prompt_tokens": n_prompt, "completion_tokens": written, "total_tokens": n_prompt + written}


def _finite(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, LEAST)


def text_logprobs(pieces: "Sequence[Piece]", decode: Decode, *, offset: int = 0) -> Json:
    """Of /v1/completions: lists by token, top_logprobs as an iterator; text_offset counts characters of the answer."""
    offsets = []
    for piece in pieces:
        offsets.append(offset)
        offset += len(piece.text)
    return {
        "tokens": [decode(piece.token) for piece in pieces],
        "token_logprobs": [_finite(piece.logprob) for piece in pieces],
        "top_logprobs": ({decode(token): _finite(p) for token, p in reversed(piece.top)} for piece in pieces),
        "text_offset": offsets,
    }


def chat_logprobs(pieces: "Sequence[Piece]", decode: Decode) -> Json:
    """Of /v1/chat/completions: an entry per token, with its alternatives; an iterator of them."""

    def entry(token: int, logprob: float | None) -> Json:
        text = decode(token)
        whole = "\ufffd" not in text  # part of a character has bytes, but they are not those of the text
        return {"token": text, "logprob": _finite(logprob), "bytes": list(text.encode()) if whole else None}

    return {
        "content": (
            {**entry(piece.token, piece.logprob), "top_logprobs": [entry(*one) for one in piece.top]}
            for piece in pieces
        )
    }


def listed(logprobs: Json | None) -> Json | None:
    """The same with lists, for an event of a stream."""
    return logprobs and {name: list(value) for name, value in logprobs.items()}


class Completion:
    """/v1/completions: each choice is text."""

    is_whole = False  # whether a stream waits for the end of each answer
    kind, chunk_kind = "text_completion", "text_completion"

    def __init__(self, decode: Decode, logprobs: int | None) -> None:
        self.decode, self.logprobs = decode, logprobs
        self.offsets: dict[int, int] = {}

    def choice(self, n: int, pieces: "Sequence[Piece]", finish: str | None) -> Json:
        """Answer n, whole."""
        return self._choice(n, "".join(piece.text for piece in pieces), pieces, finish)

    def opening(self, n: int) -> Json | None:
        """What stands before the pieces of answer n."""

    def piece(self, n: int, piece: "Piece") -> Json:
        """One piece of answer n."""
        choice = self._choice(n, piece.text, [piece], None)
        return {**choice, "logprobs": listed(choice["logprobs"])}

    def closing(self, n: int, finish: str | None) -> Json:
        """The end of answer n."""
        return self._choice(n, "", [], finish)

    def _choice(self, n: int, text: str, pieces: "Sequence[Piece]", finish: str | None) -> Json:
        found = None
        if self.logprobs is not None and pieces:
            found = text_logprobs(pieces, self.decode, offset=self.offsets.get(n, 0))
            self.offsets[n] = self.offsets.get(n, 0) + len(text)
        return {"index": n, "text": text, "logprobs": found, "finish_reason": finish}


class Chat:
    """/v1/chat/completions: each choice is a message of the assistant, in a stream a delta of it."""

    is_whole = False
    kind, chunk_kind = "chat.completion", "chat.completion.chunk"

    def __init__(self, decode: Decode, logprobs: int | None) -> None:
        self.decode, self.logprobs = decode, logprobs

    def choice(self, n: int, pieces: "Sequence[Piece]", finish: str | None) -> Json:
        """Answer n, whole."""
        message = {"role": "assistant", "content": "".join(piece.text for piece in pieces), "refusal": None}
        return {"index": n, "message": message, "logprobs": self._logprobs(pieces), "finish_reason": finish}

    def opening(self, n: int) -> Json | None:
        """What stands before the pieces of answer n."""
        return self._delta(n, {"role": "assistant", "content": ""}, [], None)

    def piece(self, n: int, piece: "Piece") -> Json:
        """One piece of answer n."""
        return self._delta(n, {"content": piece.text}, [piece], None)

    def closing(self, n: int, finish: str | None) -> Json:
        """The end of answer n."""
        return self._delta(n, {}, [], finish)

    def _delta(self, n: int, delta: Mapping[str, str], pieces: "Sequence[Piece]", finish: str | None) -> Json:
        logprobs = listed(self._logprobs(pieces))
        return {"index": n, "delta": dict(delta), "logprobs": logprobs, "finish_reason": finish}

    def _logprobs(self, pieces: "Sequence[Piece]") -> Json | None:
        return None if self.logprobs is None or not pieces else chat_logprobs(pieces, self.decode)


Format = Completion | Chat
