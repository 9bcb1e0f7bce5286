"""Chat templates: conversations as text, and where in it assistants speak."""

import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from genai_pl.data.assistant_spans import (
    PROBE_QUESTION,
    PROBES,
    Message,
    Messages,
    Tools,
    assistant_span,
    include_end_token,
    with_arguments,
)
from genai_pl.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHATML = ("<|im_start|>", "<|im_end|>")
# what a tokenizer without a template is given: ChatML, a role and what it says between two markers
TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


class Rendering(NamedTuple):
    """A conversation as the chat template writes it."""

    text: str
    spans: list[tuple[int, int]]  # characters that assistants write, the end of their turn included
    is_unclosed: bool  # whether nothing closes the last of them: the template leaves that to the end token


def ensure_template(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Give a tokenizer without a chat template ChatML, whose markers become special tokens; all is saved with the model."""
    if tokenizer.chat_template is None:
        tokenizer.chat_template = TEMPLATE
        vocab = tokenizer.get_vocab()
        tokenizer.add_tokens([marker for marker in CHATML if marker not in vocab], special_tokens=True)


def turn_end_token(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """The special token that closes an assistant's turn under the chat template; None where there is none."""
    if tokenizer.chat_template is None:
        return None
    try:
        text = ChatTemplate(tokenizer).render([PROBE_QUESTION, {"role": "assistant", "content": PROBES[1]}])
    except DataError:  # a template that takes no plain conversation
        return None
    _, found, after = text.rpartition(PROBES[1])
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids = tokenizer(after, add_special_tokens=False)["input_ids"] if found else []
    return next((i for i in ids if i in special), None)


class ChatTemplate:
    """The chat template of a tokenizer; DataError from its methods where a conversation does not suit it."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        if tokenizer.chat_template is None:
            raise DataError("messages: the tokenizer has no chat template, so conversations cannot be read")
        self.tokenizer, self.needs_parts = tokenizer, False
        self.supports_tools: bool | None = None  # not known before some are given
        special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        special = sorted(filter(None, special), key=len, reverse=True)
        self.special = re.compile("|".join(map(re.escape, special)) or r"(?!)")
        # templates of models that see pictures want the content as a list of parts, and some lose a text without a word
        self.needs_parts = PROBES[0] not in (self.try_render([PROBE_QUESTION]) or "")

    def render(self, messages: Messages, tools: Tools = (), *, add_generation_prompt: bool = False) -> str:
        """The text of a conversation."""
        from jinja2 import TemplateError

        turns = [self._in_parts(message) for message in messages] if self.needs_parts else list(messages)
        options = {"tools": list(tools) or None, "tokenize": False, "add_generation_prompt": add_generation_prompt}
        try:
            try:
                return self.tokenizer.apply_chat_template(turns, **options)
            except TypeError:  # some templates want the arguments of calls as JSON text, most as objects
                return self.tokenizer.apply_chat_template([*map(_with_json_arguments, turns)], **options)
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise DataError(f"messages: the chat template refuses a conversation ({error})") from None

    def prompt(self, messages: Messages, tools: Tools = ()) -> str:
        """The text of a conversation with the beginning of the answer."""
        check_messages(messages)
        text = self.render(messages, tools, add_generation_prompt=True)
        self._check_tools(tools)
        for n, message in enumerate(messages):
            if message["role"] != "assistant":
                _check_turn_rendered(message, n, text)
        return text

    def render_with_spans(self, messages: Messages, n_prompt: int = 0, tools: Tools = ()) -> Rendering:
        """The conversation, and what assistants say in it after the first `n_prompt` messages.

        Spans are found in the text that is returned: a template may write a turn otherwise once others follow it.
        """
        check_messages(messages)
        text, last = self.render(messages, tools), len(messages) - 1
        self._check_tools(tools)
        spans: list[tuple[int, int]] = []
        for n, message in enumerate(messages):
            if message["role"] != "assistant":
                _check_turn_rendered(message, n, text)
            elif n >= n_prompt:
                lowest = spans[-1][1] if spans else 0
                start, end = assistant_span(self, text, messages, n, tools, lowest=lowest)
                spans.append((start, include_end_token(self.special, text, end)))
                _check_turn_rendered(message, n, text[start:end])
                _check_turn_separate(messages, n, text[start:end])
        said = messages[last].get("content") if messages[last]["role"] == "assistant" else ""
        return Rendering(text, spans, is_unclosed=bool(said) and text.endswith(str(said).rstrip()))

    def _check_tools(self, tools: Tools) -> None:
        if tools and self.supports_tools is None:
            self.supports_tools = self.try_render([PROBE_QUESTION], tools) != self.try_render([PROBE_QUESTION])
        if tools and not self.supports_tools:
            raise DataError("tools: the chat template has no place for them; leave them out, or use one that has")

    def try_render(self, messages: Messages, tools: Tools = (), **options: bool) -> str | None:
        """The rendering of a part of a conversation, or None if the template wants a whole one."""
        try:
            return self.render(messages, tools, **options)
        except DataError:
            return None

    @staticmethod
    def _in_parts(message: Message) -> Message:
        content = message.get("content")
        return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


def check_messages(messages: Messages) -> None:
    """DataError unless there are messages and each has a role, and a content or calls of tools."""
    if not messages:
        raise DataError("messages: a conversation without messages")
    for message in messages:
        if not isinstance(message, Mapping) or "role" not in message or not {"content", "tool_calls"} & set(message):
            raise DataError(f"messages: each is an object with role and content, not {message!r}")


def _check_turn_rendered(message: Message, n: int, text: str) -> None:
    """DataError where the text lacks a turn that a template has left out without a word, or the calls in it."""
    calls = [call.get("function", call)["name"] for call in message.get("tool_calls") or ()]
    # the last line: thoughts before it may be left out, as the model's own template decides
    content = str(message.get("content") or "").rpartition("\n")[2].rpartition("</think>")[2]
    for what, words in [
        *(("the call in turn", name) for name in calls),
        ("turn" if not calls else "the text of turn", content),
    ]:
        if not _contains(text, words):
            raise DataError(f"messages: the chat template leaves out {what} {n + 1} ({message['role']})")


def _check_turn_separate(messages: Messages, n: int, text: str) -> None:
    """DataError where the template writes what a tool answers in the middle of the turn that calls it."""
    own = json.dumps(messages[n], ensure_ascii=False, default=str)
    for message in messages[n + 1 :] if messages[n].get("tool_calls") else ():
        content = str(message.get("content") or "").strip()
        if message["role"] == "tool" and content and _contains(text, content) and content not in own:
            raise DataError(f"messages: the chat template writes the answer of a tool into turn {n + 1} (assistant)")


def _contains(text: str, words: str) -> bool:
    """Whether the words stand in the text, as they are or as JSON has them."""
    words = words.strip()
    return words in text or json.dumps(words, ensure_ascii=False)[1:-1] in text


def _with_json_arguments(message: Message) -> Message:
    """The message with the arguments of its calls as JSON text."""
    calls = []
    for call in message.get("tool_calls") or ():
        arguments = call.get("function", call).get("arguments")
        as_text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        calls.append(with_arguments(call, as_text))
    return {**message, "tool_calls": calls} if calls else message
