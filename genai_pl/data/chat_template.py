"""Chat templates: conversations rendered as text, and the spans of assistants in that text.

`ChatTemplate` wraps the Jinja template of a tokenizer. Templates in the wild differ in what they accept (text or a list
of parts, arguments of calls as objects or as JSON text) and silently drop what they do not expect. So the wrapper tries
the variants, and checks that every turn, call and tool it was given occurs in the text: training on a conversation
without its question, or serving one, would be wrong without an error.
"""

import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from genai_pl.data.assistant_spans import (
    PROBE_QUESTION,
    PROBES,
    REASONING_KEYS,
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
# for tokenizers without a template, ChatML: role and content between two markers
TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


class Rendering(NamedTuple):
    """A conversation as the chat template renders it.

    text: the whole conversation.
    spans: (start, end) of each assistant turn in characters of `text`, its end marker included; these are learned.
    is_unclosed: whether `text` ends with the last answer and no marker closes it. The end token then does.
    """

    text: str
    spans: list[tuple[int, int]]
    is_unclosed: bool


def ensure_template(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Give a tokenizer without a chat template ChatML, with its two markers as special tokens; both are saved with the model."""
    if tokenizer.chat_template is None:
        tokenizer.chat_template = TEMPLATE
        vocab = tokenizer.get_vocab()
        tokenizer.add_tokens([marker for marker in CHATML if marker not in vocab], special_tokens=True)


def turn_end_token(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """The id of the special token that closes an assistant's turn under the chat template, or None.

    It is an end-of-sequence token in all but name: a chat model emits it where a base model emits eos.
    """
    if tokenizer.chat_template is None:
        return None
    try:
        text = ChatTemplate(tokenizer).render([PROBE_QUESTION, {"role": "assistant", "content": PROBES[1]}])
    except DataError:  # a template that takes no plain conversation
        return None
    _, probe, after = text.rpartition(PROBES[1])
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids = tokenizer(after, add_special_tokens=False)["input_ids"] if probe else []
    return next((i for i in ids if i in special), None)


class ChatTemplate:
    """The chat template of a tokenizer; its methods raise DataError for conversations that it cannot render.

    needs_parts: the template reads `content` as a list of parts (those of models that see images).
    supports_tools: whether tools change the text; None until tools are given for the first time.
    shows_all_calls: every call of a turn is in the text; False until a turn with several has shown it.
    reasoning_keys: the keys of a message whose text is in the rendering of a last turn; None until reasoning is given.
    special: matches any special token of the tokenizer, longest first.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        if tokenizer.chat_template is None:
            raise DataError("messages: the tokenizer has no chat template, so conversations cannot be read")
        self.tokenizer, self.needs_parts = tokenizer, False
        self.supports_tools: bool | None = None  # not known before some are given
        self.reasoning_keys: tuple[str, ...] | None = None
        self.shows_all_calls = False
        special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        special = sorted(filter(None, special), key=len, reverse=True)
        self.special = re.compile("|".join(map(re.escape, special)) or r"(?!)")
        # templates of models that see images want a list of parts, and some drop a text silently
        self.needs_parts = not self._shows_question() and self._shows_question(in_parts=True)

    def render(
        self,
        messages: Messages,
        tools: Tools = (),
        *,
        add_generation_prompt: bool = False,
        variables: Mapping[str, object] | None = None,
    ) -> str:
        """The text of a conversation; DataError with the template's own message if it refuses.

        variables: further ones that the template reads, see `template_options`
        """
        from jinja2 import TemplateError

        turns = [self._with_own_key(message) for message in messages]
        turns = [self._in_parts(message) for message in turns] if self.needs_parts else turns
        options = {"tools": list(tools) or None, "tokenize": False, "add_generation_prompt": add_generation_prompt}
        options = {**(variables or {}), **options}
        try:
            try:
                return self.tokenizer.apply_chat_template(turns, **options)
            except TypeError:  # most templates read the arguments of calls as objects, some as JSON text
                return self.tokenizer.apply_chat_template([*map(_with_json_arguments, turns)], **options)
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            raise DataError(f"messages: the chat template refuses a conversation ({error})") from None

    def prompt(self, messages: Messages, tools: Tools = (), variables: Mapping[str, object] | None = None) -> str:
        """The text of a conversation up to and including the generation prompt: what a model continues."""
        check_messages(messages)
        text = self.render(messages, tools, add_generation_prompt=True, variables=variables)
        self._check_tools(tools, text)
        for n, message in enumerate(messages):
            if message["role"] != "assistant":
                _check_turn_rendered(message, n, text)
            self._check_all_calls(messages, n, tools)
        return text

    def render_with_spans(self, messages: Messages, n_prompt: int = 0, tools: Tools = ()) -> Rendering:
        """The conversation and the spans of assistants after the first `n_prompt` messages.

        Spans refer to the text that is returned: a template may write a turn differently once others follow it.
        """
        check_messages(messages)
        # render once: all spans are of this text
        text, last = self.render(messages, tools), len(messages) - 1
        self._check_tools(tools, text)
        spans: list[tuple[int, int]] = []
        for n, message in enumerate(messages):
            self._check_all_calls(messages, n, tools)
            if message["role"] != "assistant":
                _check_turn_rendered(message, n, text)
            elif n >= n_prompt:
                min_start = spans[-1][1] if spans else 0
                # spans are in order, so each is searched after the one before
                start, end = assistant_span(self, text, messages, n, tools, min_start=min_start)
                spans.append((start, include_end_token(self.special, text, end)))
                _check_turn_rendered(message, n, text[start:end])
                self._check_reasoning(message, n)
                _check_turn_separate(messages, n, text[start:end])
        answer = messages[last].get("content") if messages[last]["role"] == "assistant" else ""
        return Rendering(text, spans, is_unclosed=bool(answer) and text.endswith(str(answer).rstrip()))

    def _check_tools(self, tools: Tools, text: str) -> None:
        """DataError where tools are given and the template ignores them; found once by rendering with and without."""
        if tools and self.supports_tools is None:
            self.supports_tools = self.try_render([PROBE_QUESTION], tools) != self.try_render([PROBE_QUESTION])
        if tools and not self.supports_tools:
            raise DataError(
                "tools: the chat template has no place for them; leave them out, or put a chat_template.jinja that has "
                "into the model's folder"
            )
        for name in (str(tool.get("function", tool).get("name", "")) for tool in tools):
            if name not in text:
                raise DataError(f"tools: the chat template leaves out {name}")

    def _with_own_key(self, message: Message) -> Message:
        """The message with its reasoning under a key that the template reads, of the three in use."""
        given = reasoning_of(message)
        if not given:
            return message
        if self.reasoning_keys is None:
            self.reasoning_keys = ()  # while it is found out
            turns = {key: {"role": "assistant", "content": PROBES[0], key: PROBES[1]} for key in REASONING_KEYS}
            shown = (key for key, turn in turns.items() if PROBES[1] in (self.try_render([PROBE_QUESTION, turn]) or ""))
            self.reasoning_keys = tuple(shown)
        if not self.reasoning_keys or given.keys() & {*self.reasoning_keys}:
            return message
        rest = {key: value for key, value in message.items() if key not in given}
        return {**rest, self.reasoning_keys[0]: next(iter(given.values()))}

    def _check_reasoning(self, message: Message, n: int) -> None:
        """DataError where a turn has reasoning and the template prints none, not even that of the last turn."""
        if reasoning_of(message) and not self.reasoning_keys:
            raise DataError(
                f"messages: the chat template has no place for the reasoning of turn {n + 1}; write it into the content, "
                f"or leave out {' and '.join(reasoning_of(message))}"
            )

    def _check_all_calls(self, messages: Messages, n: int, tools: Tools) -> None:
        """DataError where the template prints one of several calls of a turn: names alone do not tell calls of one tool apart."""
        calls = messages[n].get("tool_calls") or ()
        if len(calls) < 2 or self.shows_all_calls:
            return
        turns = (messages[n], *({**messages[n], "tool_calls": some} for some in (calls[1:], calls[:-1])))
        whole, *fewer = (self.try_render([*messages[:n], turn], tools) for turn in turns)
        if whole in fewer and whole is not None:
            raise DataError(
                f"messages: the chat template leaves out a call in turn {n + 1} (assistant): give each call a turn of its own"
            )
        self.shows_all_calls = None not in (whole, *fewer)

    def _shows_question(self, *, in_parts: bool = False) -> bool:
        """Whether a question is in the text as a text, or as a list of parts that is not printed as such."""
        self.needs_parts = in_parts
        text = self.try_render([PROBE_QUESTION]) or ""
        return PROBES[0] in text and not (in_parts and "'type'" in text)

    def try_render(self, messages: Messages, tools: Tools = (), **options: bool) -> str | None:
        """The rendering of a part of a conversation, or None if the template takes only whole ones."""
        try:
            return self.render(messages, tools, **options)
        except DataError:
            return None

    @staticmethod
    def _in_parts(message: Message) -> Message:
        """The message with its text as a list of one text part."""
        content = message.get("content")
        return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


def reasoning_of(message: Message) -> dict[str, object]:
    """The keys of a message that hold reasoning, with their texts."""
    return {key: message[key] for key in REASONING_KEYS if message.get(key)}


def check_messages(messages: Messages) -> None:
    """DataError unless there are messages and each has a role, and content or tool calls."""
    if not messages:
        raise DataError("messages: a conversation without messages")
    for message in messages:
        if not isinstance(message, Mapping) or "role" not in message or not {"content", "tool_calls"} & set(message):
            raise DataError(f"messages: each is an object with role and content, not {message!r}")


def _check_turn_rendered(message: Message, n: int, text: str) -> None:
    """DataError where the template silently dropped the turn's content or one of its calls."""
    calls = [call.get("function", call)["name"] for call in message.get("tool_calls") or ()]
    # only the last line: templates may drop the thoughts before it
    content = str(message.get("content") or "").rpartition("\n")[2].rpartition("</think>")[2]
    for name_of_part, words in [
        *(("the call in turn", name) for name in calls),
        ("turn" if not calls else "the text of turn", content),
    ]:
        if not _contains(text, words):
            raise DataError(f"messages: the chat template leaves out {name_of_part} {n + 1} ({message['role']})")


def _check_turn_separate(messages: Messages, n: int, text: str) -> None:
    """DataError where the template renders a tool's answer inside the turn that calls the tool: it would be learned."""
    # a tool may repeat words of the turn itself; those are no evidence
    own = json.dumps(messages[n], ensure_ascii=False, default=str)
    for message in messages[n + 1 :] if messages[n].get("tool_calls") else ():
        content = str(message.get("content") or "").strip()
        if message["role"] == "tool" and content and _contains(text, content) and content not in own:
            raise DataError(f"messages: the chat template writes the answer of a tool into turn {n + 1} (assistant)")


def _contains(text: str, words: str) -> bool:
    """Whether the text has the words, as they are or escaped as in JSON.

    >>> _contains('{"q": "a \\"b\\""}', 'a "b"'), _contains("abc", "x")
    (True, False)
    """
    words = words.strip()
    return words in text or json.dumps(words, ensure_ascii=False)[1:-1] in text


def _with_json_arguments(message: Message) -> Message:
    """The message with the arguments of its calls as JSON text, which some templates require."""
    calls = []
    for call in message.get("tool_calls") or ():
        arguments = call.get("function", call).get("arguments")
        as_text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        calls.append(with_arguments(call, as_text))
    return {**message, "tool_calls": calls} if calls else message
