"""Conversations as text: the chat template is rendered step by step, so that every token knows who says it."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from genai_pl.data.tokenizer import end_token
from genai_pl.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = Sequence[Mapping[str, str]]
# what a tokenizer without a template is given: a role and what it says between two markers, as ChatML has them
TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


class Example(NamedTuple):
    """Tokens of one example, and which of them the model is to say."""

    input_ids: np.ndarray
    loss_mask: np.ndarray


def ensure_template(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Give a tokenizer without a chat template the one above; it is saved with the model."""
    if tokenizer.chat_template is None:
        tokenizer.chat_template = TEMPLATE


def encode_messages(tokenizer: "PreTrainedTokenizerBase", messages: Messages) -> Example:
    """The rendered conversation; what assistants say is to be learned, the marker that ends it included."""
    _check(messages)
    text, spans = "", []
    for n, message in enumerate(messages, start=1):
        if message["role"] == "assistant":
            asked = _render(tokenizer, messages[: n - 1], add_generation_prompt=True)
            said = _render(tokenizer, messages[:n])
            if not said.startswith(asked):  # a template that opens the answer otherwise than it prompts for it
                asked = _common(asked, said)
            spans.append((len(asked), len(said)))
            text = said
    text = _render(tokenizer, messages)
    return _encode(tokenizer, text, spans)


def encode_completion(
    tokenizer: "PreTrainedTokenizerBase", prompt: str | Messages, completion: str | Messages
) -> Example:
    """A prompt, and the completion that is to be learned with an end token after it; or both as messages."""
    if not isinstance(prompt, str):
        return encode_messages(tokenizer, [*prompt, *_as_messages(completion)])
    given = tokenizer(prompt)["input_ids"]
    if given[-1:] == [end_token(tokenizer)]:  # what some tokenizers close every text with
        given = given[:-1]
    said = tokenizer(completion, add_special_tokens=False)["input_ids"]
    end = [] if end_token(tokenizer) is None else [end_token(tokenizer)]
    ids = np.asarray([*given, *said, *end], dtype=np.int32)
    return Example(ids, np.arange(len(ids)) >= len(given))


def encode_prompt(tokenizer: "PreTrainedTokenizerBase", prompt: str | Messages) -> np.ndarray:
    """The tokens that a model continues: a text, or messages with the beginning of the answer."""
    if isinstance(prompt, str):
        ids = tokenizer(prompt)["input_ids"]
        ids = ids[:-1] if ids[-1:] == [end_token(tokenizer)] else ids
    else:
        _check(prompt)
        text = _render(tokenizer, prompt, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return np.asarray(ids, dtype=np.int32)


def _encode(tokenizer: "PreTrainedTokenizerBase", text: str, spans: Sequence[tuple[int, int]]) -> Example:
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    starts = np.asarray([start for start, _ in encoded["offset_mapping"]])
    mask = np.zeros(len(starts), bool)
    for start, end in spans:
        mask |= (starts >= start) & (starts < end)
    return Example(np.asarray(encoded["input_ids"], dtype=np.int32), mask)


def _render(tokenizer: "PreTrainedTokenizerBase", messages: Messages, *, add_generation_prompt: bool = False) -> str:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except (TemplateError, TypeError) as error:
        raise DataError(f"messages: the chat template refuses a conversation ({error})") from None


def _check(messages: Messages) -> None:
    for message in messages:
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise DataError(f"messages: each is an object with role and content, not {message!r}")


def _as_messages(completion: str | Messages) -> Messages:
    return [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion


def _common(a: str, b: str) -> str:
    n = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return a[:n]
