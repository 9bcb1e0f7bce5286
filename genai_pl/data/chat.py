"""Conversations as text: the chat template is rendered step by step, so that every token knows who says it."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from genai_pl.data.tokenizer import end_token
from genai_pl.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = Sequence[Mapping[str, str]]
QUIET = {"verbose": False}  # long texts are cut, or refused, where their tokens are used
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


def turn_end(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """The special token that closes an assistant's turn under the chat template; None where there is none."""
    if tokenizer.chat_template is None:
        return None
    words = "0123456789"
    text = _render(tokenizer, [{"role": "user", "content": "?"}, {"role": "assistant", "content": words}])
    _, found, after = text.rpartition(words)
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids = tokenizer(after, add_special_tokens=False)["input_ids"] if found else []
    return next((i for i in ids if i in special), None)


def encode_messages(tokenizer: "PreTrainedTokenizerBase", messages: Messages) -> Example:
    """The rendered conversation; what assistants say is to be learned, the marker that ends it included."""
    return encode_conversations(tokenizer, [messages], [0])[0]


def encode_conversations(
    tokenizer: "PreTrainedTokenizerBase", conversations: Sequence[Messages], given: Sequence[int]
) -> list[Example]:
    """The same of each; nothing is to be learned of its first `given` messages."""
    rendered = [_with_spans(tokenizer, messages, n) for messages, n in zip(conversations, given, strict=True)]
    encoded = tokenizer([text for text, _ in rendered], add_special_tokens=False, **QUIET, return_offsets_mapping=True)
    parts = zip(encoded["input_ids"], encoded["offset_mapping"], rendered, strict=True)
    return [_masked(ids, offsets, spans) for ids, offsets, (_, spans) in parts]


def encode_completion(
    tokenizer: "PreTrainedTokenizerBase", prompt: str | Messages, completion: str | Messages
) -> Example:
    """A prompt, and the completion that is to be learned with an end token after it; or both as messages."""
    return encode_completions(tokenizer, [prompt], [completion])[0]


def encode_completions(
    tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[str | Messages], completions: Sequence[str | Messages]
) -> list[Example]:
    """The same of each; the prompts are texts, or all of them messages."""
    if not isinstance(prompts[0], str):
        return _encode_talks(tokenizer, prompts, completions)
    parts = zip(encode_prompts(tokenizer, prompts), encode_answers(tokenizer, prompts, completions), strict=True)
    return [Example(np.concatenate(part), np.arange(sum(map(len, part))) >= len(part[0])) for part in parts]


def encode_answers(
    tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[str | Messages], completions: Sequence[str | Messages]
) -> list[np.ndarray]:
    """The tokens of each completion after its prompt, those that are to be learned."""
    if not isinstance(prompts[0], str):
        return [example.input_ids[example.loss_mask] for example in _encode_talks(tokenizer, prompts, completions)]
    end = [] if end_token(tokenizer) is None else [end_token(tokenizer)]
    rows = tokenizer(list(completions), add_special_tokens=False, **QUIET)["input_ids"]
    return [np.asarray([*said, *end], dtype=np.int32) for said in rows]


def encode_prompt(
    tokenizer: "PreTrainedTokenizerBase", prompt: str | Messages, tools: Sequence[Mapping[str, object]] = ()
) -> np.ndarray:
    """The tokens that a model continues: a text, or messages with the beginning of the answer, which may call tools."""
    return encode_prompts(tokenizer, [prompt], tools)[0]


def encode_prompts(
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str | Messages],
    tools: Sequence[Mapping[str, object]] = (),
) -> list[np.ndarray]:
    """The same of each; they are texts, or all of them messages."""
    if isinstance(prompts[0], str):
        end = [end_token(tokenizer)]  # what some tokenizers close every text with
        rows = [ids[:-1] if ids[-1:] == end else ids for ids in tokenizer(list(prompts), **QUIET)["input_ids"]]
    else:
        for prompt in prompts:
            _check(prompt)
        texts = [_render(tokenizer, prompt, tools, add_generation_prompt=True) for prompt in prompts]
        rows = tokenizer(texts, add_special_tokens=False, **QUIET)["input_ids"]
    return [np.asarray(ids, dtype=np.int32) for ids in rows]


def _encode_talks(
    tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[Messages], completions: Sequence[str | Messages]
) -> list[Example]:
    whole = [[*prompt, *_as_messages(said)] for prompt, said in zip(prompts, completions, strict=True)]
    return encode_conversations(tokenizer, whole, [len(prompt) for prompt in prompts])


def _with_spans(
    tokenizer: "PreTrainedTokenizerBase", messages: Messages, given: int
) -> tuple[str, list[tuple[int, int]]]:
    """The rendered text, and from where to where assistants speak in it after the given messages."""
    _check(messages)
    spans, said = [], ""
    for n, message in enumerate(messages, start=1):
        if n > given and message["role"] == "assistant":
            asked = _render(tokenizer, messages[: n - 1], add_generation_prompt=True)
            said = _render(tokenizer, messages[:n])
            if not said.startswith(asked):  # a template that opens the answer otherwise than it prompts for it
                asked = _common(asked, said)
            spans.append((len(asked), len(said)))
    closed = bool(messages) and messages[-1]["role"] == "assistant" and len(messages) > given
    return (said if closed else _render(tokenizer, messages)), spans


def _masked(ids: Sequence[int], offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> Example:
    """The tokens, of which those that begin in a span are to be learned."""
    starts = np.asarray([start for start, _ in offsets])
    mask = np.zeros(len(starts), bool)
    for start, end in spans:
        mask |= (starts >= start) & (starts < end)
    return Example(np.asarray(ids, dtype=np.int32), mask)


def _render(
    tokenizer: "PreTrainedTokenizerBase",
    messages: Messages,
    tools: Sequence[Mapping[str, object]] = (),
    *,
    add_generation_prompt: bool = False,
) -> str:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(
            list(messages), list(tools) or None, tokenize=False, add_generation_prompt=add_generation_prompt
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
