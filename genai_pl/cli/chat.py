"""Chat in the terminal or through a pipe: one line in, one answer out, streamed.

The conversation is kept as messages and rendered anew for each turn, so that a context too long for the model loses
its oldest messages first. Answers go to stdout and notes to stderr: a pipe gets answers alone.
"""

import json
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from genai_pl.config.generation import GenerationConfig
from genai_pl.data.chat_template import Message
from genai_pl.data.tool_calls import CallReader
from genai_pl.environments.tools import Tools
from genai_pl.environments.user_code import run_all
from genai_pl.errors import ConfigError, UserError
from genai_pl.generation import Acceptance, build_output_constraints, complete
from genai_pl.generation.conversation import Conversation
from genai_pl.generation.prefix_cache import PrefixCache
from genai_pl.loading import Loaded, load_draft
from genai_pl.models.virtual_tokens import context_of

MAX_CALLS = 8  # answers with calls of tools before the last one
QUOTES = '"""'  # around a message of several lines
HELP = f"""/help        these lines
/reset       begin anew: all that was said is forgotten, but for system=
/save FILE   append the conversation to a file, a line of JSON that data=chat trains on
/exit        end; Ctrl-D does so too
{QUOTES}          before and after a message of several lines
Ctrl-C       stop the answer; once more, end"""


class Chat:
    """A conversation with a loaded model.

    loaded: model and tokenizer. options: decoding settings; max_new_tokens bounds each answer. system: first
    message, which `/reset` keeps. stream: print text as it is decoded. generator: of the sampling. tools: functions
    that the model may call; an answer is then printed whole, as a call shows at its end.
    """

    def __init__(
        self,
        loaded: Loaded,
        options: GenerationConfig,
        *,
        system: str | None,
        stream: bool,
        generator: torch.Generator,
        tools: Tools | None = None,
    ) -> None:
        """ConfigError for a model that does not write. The draft model, if any, is loaded here."""
        model, tokenizer, _ = loaded
        if not model.config.writes:
            raise ConfigError("chat=true needs a model that writes, this one reads only")
        self.loaded, self.options, self.generator, self.tools = loaded, options, generator, tools
        self.stream = stream and tools is None
        schemas = [] if tools is None else tools.schemas
        self.conversation = Conversation(tokenizer, context=context_of(model), system=system, tools=schemas)
        self.reader = CallReader(tokenizer) if schemas else None
        self.draft = load_draft(options.draft, loaded)
        self.prefix_cache = PrefixCache()  # earlier turns, which the next prompt begins with, are not read again
        self.ends = build_output_constraints(tokenizer, options, model.config.eos_token_ids).ends
        # a short context is not all for the answer
        self.answer_tokens = min(options.max_new_tokens, max(1, self.conversation.context // 2))

    def ask(self, text: str) -> None:
        """Print the answer to a message and keep both; Ctrl-C stops the answer, keeps what was written and raises
        KeyboardInterrupt.

        Calls of tools are run, and the model goes on with their results, up to MAX_CALLS times.
        """
        turns, n_dropped = [], 0
        for n in range(MAX_CALLS + 1):
            prompt = self.conversation.prompt(text, max_new_tokens=self.answer_tokens, calls=turns)
            n_dropped = max(n_dropped, prompt.n_dropped)
            if prompt.n_dropped and not n:
                print_note(
                    f"the oldest {prompt.n_dropped} messages do not fit into the context any more and are left out"
                )
            answer, tokens, reason, stopped = self._write(prompt.tokens)
            calls = [] if self.reader is None or reason or stopped or n == MAX_CALLS else self._calls(answer, tokens)
            if not calls:
                break
            turns += calls
        # an empty answer takes its question back
        print("" if self.stream else answer, flush=True)
        if answer.strip():
            self.conversation.add(text, answer, n_dropped, turns)
        elif not stopped:
            print_note("the model ended its answer before it began; the message is taken back")
        if reason:
            print_note(f"the answer was cut: {reason}")
        if stopped:
            raise KeyboardInterrupt

    def _write(self, prompt: list[int]) -> tuple[str, list[int], str, bool]:
        """(text, tokens, why the answer was cut, whether Ctrl-C stopped it) of the answer to a prompt."""
        # the rest of the context, at most, is for the answer
        most = min(self.options.max_new_tokens, self.conversation.context - len(prompt))
        options = replace(self.options, max_new_tokens=most, min_new_tokens=min(self.options.min_new_tokens, most))
        deltas: list[str] = []

        def show(_: int, delta: str) -> None:
            """Keep a piece of text, and print it if the answer streams."""
            deltas.append(delta)
            if self.stream:
                print(delta, end="", flush=True)

        # decode; an answer at its limit without an end token was cut
        try:
            written = complete(
                self.loaded.model,
                self.loaded.tokenizer,
                [prompt],
                options,
                generator=self.generator,
                on_text=show,
                draft=self.draft,
                acceptance=Acceptance(),
                prefix_cache=self.prefix_cache,
            )[0][0]
        except KeyboardInterrupt:
            return "".join(deltas), [], "", True
        reason = ""
        if len(written.tokens) >= most and written.tokens[-1] not in self.ends:
            short = most < self.options.max_new_tokens
            reason = "the context is full" if short else f"generation.max_new_tokens={most}"
        return "".join(deltas), written.tokens, reason, False

    def _calls(self, answer: str, tokens: list[int]) -> list[Message]:
        """The turns of an answer with calls and of their results, which are shown; none for an answer without."""
        text, calls = self.reader.read(answer, tokens, self.tools.schemas)
        if not calls:
            return []
        results = run_all([self.tools.run(call) for call in calls])
        asked, told = [], []
        for call, (result, _) in zip(calls, results, strict=True):
            print_note(f"{call.name}({json.dumps(call.arguments, ensure_ascii=False)}) = {result}")
            number, name = self.reader.call_id(), call.name or "unknown"
            asked.append({"id": number, "type": "function", "function": {"name": name, "arguments": call.arguments}})
            told.append({"role": "tool", "tool_call_id": number, "name": name, "content": result})
        return [{"role": "assistant", "content": text, "tool_calls": asked}, *told]

    def save(self, path: str) -> None:
        """Append the conversation to a file as a row of `data=chat`."""
        messages = [*self.conversation.head, *self.conversation.messages]
        if not path:
            raise ConfigError("/save FILE: name a file")
        if not self.conversation.messages:
            raise ConfigError("/save: nothing was said yet")
        try:
            with Path(path).expanduser().open("a", encoding="utf-8") as file:
                tools = {} if self.tools is None else {"tools": self.tools.schemas}
                file.write(json.dumps({"messages": messages, **tools}, ensure_ascii=False) + "\n")
        except OSError as error:
            raise ConfigError(f"/save {path}: cannot be written ({error.strerror or error})") from None
        print_note(f"{len(messages)} messages appended to {path}")


def answer_all(chat: Chat, messages: Iterable[str]) -> None:
    """Answer messages in turn."""
    for text in messages:
        chat.ask(text)


def run_terminal(chat: Chat) -> int:
    """Loop over typed or piped lines until the end of input, /exit, or Ctrl-C twice; returns the exit status.

    A mistake is a note at a terminal, where the user can type again, and an error in a pipe.
    """
    typed = sys.stdin.isatty()
    if typed:
        print_note("/help says what can be typed; Ctrl-D ends")
    read = _read_terminal if typed else _read_line
    interrupted = False  # by a Ctrl-C after which nothing was typed
    with interruptible():
        # one message per turn; an error in one does not end the chat
        while True:
            try:
                text = read_message(read)
                interrupted = False
                if text is None or not run_line(chat, text):
                    return 0
            except KeyboardInterrupt:
                print(flush=True)
                if interrupted or not typed:
                    return 128 + signal.SIGINT
                interrupted = True
                print_note("stopped; Ctrl-C once more ends")
            except UserError as error:
                if not typed:
                    raise
                print_note(str(error))


def run_line(chat: Chat, text: str) -> bool:
    """Run a slash command or answer a message; False for /exit. A message may begin with a slash: only known
    shapes are commands.
    """
    word, _, rest = text.strip().partition(" ")
    # an ordinary message: /usr/bin is no command of this chat
    if not (word[:1] == "/" and word[1:].isalpha() and "\n" not in text):
        if text.strip():
            chat.ask(text)
        return True
    if word == "/exit":
        return False
    if word == "/help":
        print_note(HELP)
    elif word == "/reset":
        chat.conversation.reset()
        print_note("forgotten")
    elif word == "/save":
        chat.save(rest.strip())
    else:
        raise ConfigError(f"{word}: no such command; there are /help, /reset, /save FILE and /exit")
    return True


def read_message(read: Callable[[str], str | None]) -> str | None:
    """The next message: a line, or lines between two triple quotes; None at the end of input.

    read: a function from a prompt to a line or None.
    """
    line = read("> ")
    if line is None or not line.lstrip().startswith(QUOTES):
        return line
    lines = [line.lstrip().removeprefix(QUOTES)]
    while not lines[-1].rstrip().endswith(QUOTES):
        following = read(". ")
        if following is None:
            break
        lines.append(following)
    return "\n".join(lines).rstrip().removesuffix(QUOTES).strip("\n")


def _read_terminal(prompt: str) -> str | None:
    """A line typed at the terminal, with editing and history."""
    import readline  # noqa: F401  # makes input() edit lines and remember them

    try:
        return input(prompt)
    except EOFError:
        print(flush=True)
        return None


def _read_line(_: str) -> str | None:
    """A line of a pipe, without its line break."""
    line = sys.stdin.readline()
    return line.removesuffix("\n") if line else None


@contextmanager
def interruptible() -> Iterator[None]:
    """Context in which SIGINT raises KeyboardInterrupt, whatever handler was installed before."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def print_note(text: str) -> None:
    """Print what is no answer to stderr."""
    print(text, file=sys.stderr, flush=True)
