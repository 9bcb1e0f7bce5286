"""OpenAI's JSON: choices, stream chunks, log-probabilities and usage of completions and chat completions."""

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from genai_pl.serving.http.reasoning import MakeSplitter, Splitter, SplitText, split

if TYPE_CHECKING:
    from genai_pl.serving.answer_streams import Answer
    from genai_pl.serving.engine.request import TokenOutput

Json = dict[str, object]
Decode = Callable[[int], str]
MIN_LOGPROB = -9999.0  # OpenAI's value for an impossible token: JSON has no infinity


def header(kind: str, name: str) -> Json:
    """The first fields of an answer or chunk; `kind` is its object type, `name` the model's."""
    prefix = "cmpl" if kind == "text_completion" else "chatcmpl"
    return {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": name}


def usage(n_prompt: int, answers: "Sequence[Answer]") -> Json:
    """Token counts; each prompt counts once, however many answers it has."""
    written = sum(answer.n_generated for answer in answers)
    return {"prompt_tokens": n_prompt, "completion_tokens": written, "total_tokens": n_prompt + written}


def _finite(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, MIN_LOGPROB)


def text_logprobs(outputs: "Sequence[TokenOutput]", decode: Decode, *, offset: int = 0) -> Json:
    """`logprobs` of /v1/completions: lists with an item for each token, top_logprobs as an iterator.

    decode: text of a token id
    offset: characters of the answer before these outputs, for text_offset
    """

    def top_of(output: "TokenOutput") -> Json | None:
        if output.logprob is None:  # the first token of an echoed prompt
            return None
        return {decode(token): _finite(p) for token, p in reversed(output.top)}

    offsets = []
    for output in outputs:
        offsets.append(offset)
        offset += len(output.text)
    return {
        "tokens": [decode(output.token) for output in outputs],
        "token_logprobs": [_finite(output.logprob) for output in outputs],
        "top_logprobs": (top_of(output) for output in outputs),
        "text_offset": offsets,
    }


def chat_logprobs(outputs: "Sequence[TokenOutput]", decode: Decode) -> Json:
    """`logprobs` of /v1/chat/completions: an iterator of entries, each with its token's alternatives."""

    def entry(token: int, logprob: float | None) -> Json:
        text = decode(token)
        whole = "\ufffd" not in text  # else bytes of half a character, whose text is a replacement
        return {"token": text, "logprob": _finite(logprob), "bytes": list(text.encode()) if whole else None}

    return {
        "content": (
            {**entry(output.token, output.logprob), "top_logprobs": [entry(*one) for one in output.top]}
            for output in outputs
        )
    }


def listed(logprobs: Json | None) -> Json | None:
    """The same with lists instead of iterators, for an event of a stream."""
    return logprobs and {name: list(value) for name, value in logprobs.items()}


class CompletionFormat:
    """Choices of /v1/completions, whole and as chunks.

    decode: text of a token id, for log-probabilities
    logprobs: n likeliest tokens to report, None for no log-probabilities
    echoes: tokens of each prompt, which its n_each answers begin with; none without echo

    `streams_whole_answers`: a stream waits for the end of all answers. `kind` and `chunk_kind` are object types.
    """

    streams_whole_answers = False
    kind, chunk_kind = "text_completion", "text_completion"

    def __init__(
        self,
        decode: Decode,
        logprobs: int | None,
        echoes: "Sequence[list[TokenOutput]]" = (),
        *,
        n_each: int = 1,
    ) -> None:
        self.decode, self.logprobs, self.echoes, self.n_each = decode, logprobs, echoes, n_each
        self.offsets: dict[int, int] = {}

    def choice(self, n: int, outputs: "Sequence[TokenOutput]", finish_reason: str | None) -> Json:
        """The choice of answer n, complete."""
        outputs = [*self._echo(n), *outputs]
        return self._choice(n, "".join(output.text for output in outputs), outputs, finish_reason)

    def _echo(self, n: int) -> "list[TokenOutput]":
        return self.echoes[n // self.n_each] if self.echoes else []

    def first_chunk(self, n: int) -> Json | None:
        """The choice of the first chunk of answer n, before any output; None if there is none."""
        if not self.echoes:
            return None
        echo = self._echo(n)
        choice = self._choice(n, "".join(output.text for output in echo), echo, None)
        return {**choice, "logprobs": listed(choice["logprobs"])}

    def chunk(self, n: int, output: "TokenOutput") -> Json | None:
        """The choice of the chunk for one output of answer n; None if it adds nothing yet."""
        if not output.text and self.logprobs is None:
            return None
        choice = self._choice(n, output.text, [output], None)
        return {**choice, "logprobs": listed(choice["logprobs"])}

    def last_chunk(self, n: int, finish_reason: str | None) -> Json:
        """The choice of the last chunk of answer n, with its finish reason."""
        return self._choice(n, "", [], finish_reason)

    def _choice(self, n: int, text: str, outputs: "Sequence[TokenOutput]", finish_reason: str | None) -> Json:
        logprobs = None
        if self.logprobs is not None and outputs:
            logprobs = text_logprobs(outputs, self.decode, offset=self.offsets.get(n, 0))
            self.offsets[n] = self.offsets.get(n, 0) + len(text)
        return {"index": n, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}


class ChatFormat:
    """Choices of /v1/chat/completions: messages of the assistant, and deltas of them in a stream.

    decode, logprobs: as for completions
    make_splitter: a splitter of thoughts for each answer; they become `reasoning_content`
    """

    streams_whole_answers = False
    kind, chunk_kind = "chat.completion", "chat.completion.chunk"

    def __init__(self, decode: Decode, logprobs: int | None, make_splitter: MakeSplitter = lambda: None) -> None:
        self.decode, self.logprobs, self.make_splitter = decode, logprobs, make_splitter
        self.splitters: dict[int, Splitter | None] = {}

    def choice(self, n: int, outputs: "Sequence[TokenOutput]", finish_reason: str | None) -> Json:
        """The choice of answer n, complete."""
        reasoning, text, _ = split(outputs, self.make_splitter())
        message: Json = {"role": "assistant", "content": text, "refusal": None}
        if reasoning:
            message["reasoning_content"] = reasoning
        return {"index": n, "message": message, "logprobs": self._logprobs(outputs), "finish_reason": finish_reason}

    def split_text(self, n: int, output: "TokenOutput | None") -> SplitText:
        """New thoughts and text of answer n by one output; None: what was held back until its end."""
        if n not in self.splitters:
            self.splitters[n] = self.make_splitter()
        splitter = self.splitters[n]
        if splitter is None:
            return SplitText("", "" if output is None else output.text)
        return splitter.close() if output is None else splitter.push(output)

    def first_chunk(self, n: int) -> Json | None:
        """The choice of the first chunk of answer n, before any output; None if there is none."""
        return self._delta(n, {"role": "assistant", "content": ""}, [], None)

    def chunk(self, n: int, output: "TokenOutput") -> Json | None:
        """The choice of the chunk for one output of answer n; None if it adds nothing yet."""
        delta = _delta_of(self.split_text(n, output))
        if not delta and self.logprobs is None:
            return None
        return self._delta(n, delta or {"content": ""}, [output], None)

    def last_chunk(self, n: int, finish_reason: str | None) -> Json:
        """The choice of the last chunk of answer n, with its finish reason."""
        return self._delta(n, _delta_of(self.split_text(n, None)), [], finish_reason)

    def _delta(
        self, n: int, delta: Mapping[str, str], outputs: "Sequence[TokenOutput]", finish_reason: str | None
    ) -> Json:
        logprobs = listed(self._logprobs(outputs))
        return {"index": n, "delta": dict(delta), "logprobs": logprobs, "finish_reason": finish_reason}

    def _logprobs(self, outputs: "Sequence[TokenOutput]") -> Json | None:
        return None if self.logprobs is None or not outputs else chat_logprobs(outputs, self.decode)


def _delta_of(split_text: SplitText) -> dict[str, str]:
    """The sides that are not empty, as fields of a delta."""
    fields = {"reasoning_content": split_text.reasoning, "content": split_text.text}
    return {name: text for name, text in fields.items() if text}


AnswerFormat = CompletionFormat | ChatFormat
