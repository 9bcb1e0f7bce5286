"""Tokens of prompts and answers: the one place that says what a model is prompted with, and what it is to learn and write.

Training, evaluation, generation, serving, rollouts and judges all ask here.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from genai_pl.data.chat_template import (
    TEMPLATE,
    ChatTemplate,
    Messages,
    Rendering,
    Tools,
    ensure_template,
    turn_end_token,
)
from genai_pl.data.text_tokens import appends_end_token
from genai_pl.data.token_boundaries import NO_WARNINGS, encode_continuations, encode_with_boundaries
from genai_pl.data.tokenizer import end_token
from genai_pl.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "TEMPLATE",
    "ChatTemplate",
    "TokenizedExample",
    "Messages",
    "Tools",
    "as_messages",
    "encode_answers",
    "encode_completion",
    "encode_completions",
    "encode_conversations",
    "encode_messages",
    "encode_prompt",
    "encode_prompts",
    "ensure_template",
    "prompt_text",
    "turn_end_token",
]


class TokenizedExample(NamedTuple):
    """Tokens of one example, and which of them the model is to say."""

    input_ids: np.ndarray  # (n,) int32
    loss_mask: np.ndarray  # (n,) bool

    @property
    def n_prompt(self) -> int:
        """How many tokens come before the first that is learned; all of them if none is."""
        return int(self.loss_mask.argmax()) if self.loss_mask.any() else len(self.loss_mask)


def encode_messages(tokenizer: "PreTrainedTokenizerBase", messages: Messages, tools: Tools = ()) -> TokenizedExample:
    """The rendered conversation; what assistants say is to be learned, the marker that ends it included."""
    return encode_conversations(tokenizer, [messages], [0], [tools])[0]


def encode_conversations(
    tokenizer: "PreTrainedTokenizerBase",
    conversations: Sequence[Messages],
    n_prompt: Sequence[int],
    tools: Sequence[Tools] | None = None,
) -> list[TokenizedExample]:
    """The same of each; nothing is to be learned of its first `n_prompt` messages. `tools` are those of each conversation.

    The tokens are those of the whole text, as transformers makes them, except where the generation prompt alone has others
    than it has before the answer (a space that joins the first word, line breaks that go together at the end of a text):
    there the prompt's tokens end, as they do when the model is asked, and the answer's begin.
    """
    template = ChatTemplate(tokenizer)
    rows = zip(conversations, n_prompt, _tools_per_row(tools, len(conversations)), strict=True)
    rendered = [template.render_with_spans(messages, n, its_tools) for messages, n, its_tools in rows]
    encoded = encode_with_boundaries(tokenizer, [(r.text, [start for start, _ in r.spans]) for r in rendered])
    end = _end_ids(tokenizer)
    return [_masked(*tokens, rendering, end) for tokens, rendering in zip(encoded, rendered, strict=True)]


def encode_completion(
    tokenizer: "PreTrainedTokenizerBase", prompt: str | Messages, completion: str | Messages, tools: Tools = ()
) -> TokenizedExample:
    """A prompt, and the completion that is to be learned with an end token after it; or both as messages."""
    return encode_completions(tokenizer, [prompt], [completion], [tools])[0]


def encode_completions(
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str | Messages],
    completions: Sequence[str | Messages],
    tools: Sequence[Tools] | None = None,
) -> list[TokenizedExample]:
    """The same of each; the prompts are texts, or all of them messages."""
    if prompts and not isinstance(prompts[0], str):
        whole = [[*prompt, *as_messages(said)] for prompt, said in zip(prompts, completions, strict=True)]
        return encode_conversations(tokenizer, whole, [len(prompt) for prompt in prompts], tools)
    end = _end_ids(tokenizer)
    answers = encode_continuations(tokenizer, completions)
    parts = [
        (given, np.asarray([*said, *end], dtype=np.int32))
        for given, said in zip(encode_prompts(tokenizer, prompts), answers, strict=True)
    ]
    return [TokenizedExample(np.concatenate(part), np.arange(sum(map(len, part))) >= len(part[0])) for part in parts]


def encode_answers(
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str | Messages],
    answers: Sequence[Sequence[str | Messages]],
    tools: Sequence[Tools] | None = None,
) -> list[tuple[np.ndarray, list[np.ndarray]]]:
    """The tokens of each prompt, and of each of its answers after it: together those of `encode_completions`."""
    numbers = [n for n, some in enumerate(answers) for _ in some]
    its_tools = _tools_per_row(tools, len(prompts))
    flat = [answer for some in answers for answer in some]
    examples = iter(encode_completions(tokenizer, [prompts[n] for n in numbers], flat, [its_tools[n] for n in numbers]))
    rows = []
    for some in answers:
        own = [next(examples) for _ in some]
        n_prompt = min((example.n_prompt for example in own), default=0)
        beginnings = {example.input_ids[:n_prompt].tobytes() for example in own}
        if len(beginnings) > 1:
            raise DataError("messages: the chat template renders the prompt otherwise before another answer")
        prompt = own[0].input_ids[:n_prompt] if own else np.zeros(0, np.int32)
        rows.append((prompt, [example.input_ids[n_prompt:] for example in own]))
    return rows


def encode_prompt(
    tokenizer: "PreTrainedTokenizerBase",
    prompt: str | Messages,
    tools: Tools = (),
    template: ChatTemplate | None = None,
) -> np.ndarray:
    """The tokens that a model continues: a text, or messages with the beginning of the answer, which may call tools.

    template: the tokenizer's, where there is one already.
    """
    return encode_prompts(tokenizer, [prompt], [tools], template)[0]


def encode_prompts(
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str | Messages],
    tools: Sequence[Tools] | None = None,
    template: ChatTemplate | None = None,
) -> list[np.ndarray]:
    """The same of each; they are texts, or all of them messages."""
    if not prompts or isinstance(prompts[0], str):
        rows = tokenizer(list(prompts), **NO_WARNINGS)["input_ids"]
        end = _end_ids(tokenizer)
        if appends_end_token(tokenizer):  # what some tokenizers close every text with would end what is to be continued
            rows = [ids[:-1] if ids[-1:] == end else ids for ids in rows]
        begin = [tokenizer.bos_token_id] * 2  # a rendered conversation brings the first token, and gets no second one
        rows = [ids[1:] if ids[:2] == begin else ids for ids in rows]
    else:
        template = template or ChatTemplate(tokenizer)
        texts = [template.prompt(*row) for row in zip(prompts, _tools_per_row(tools, len(prompts)), strict=True)]
        rows = tokenizer(texts, add_special_tokens=False, **NO_WARNINGS)["input_ids"]
    return [np.asarray(ids, dtype=np.int32) for ids in rows]


def prompt_text(tokenizer: "PreTrainedTokenizerBase", prompt: str | Messages, tools: Tools = ()) -> str:
    """A prompt as text: messages are rendered, with the beginning of the answer."""
    return prompt if isinstance(prompt, str) else ChatTemplate(tokenizer).prompt(prompt, tools)


def _masked(ids: Sequence[int], starts: np.ndarray, rendering: Rendering, end: Sequence[int]) -> TokenizedExample:
    """The tokens, of which those that begin in a span are to be learned; an answer that nothing closes gets the end token."""
    mask = np.zeros(len(starts), bool)
    for start, stop in rendering.spans:
        mask |= (starts >= start) & (starts < stop)
    if rendering.is_unclosed and rendering.spans:
        ids, mask = [*ids, *end], np.concatenate([mask, np.ones(len(end), bool)])
    return TokenizedExample(np.asarray(ids, dtype=np.int32), mask)


def as_messages(completion: str | Messages) -> Messages:
    """What is said after a prompt, a text as an assistant's message."""
    return [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion


def _tools_per_row(tools: Sequence[Tools] | None, n: int) -> Sequence[Tools]:
    return [()] * n if tools is None else tools


def _end_ids(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The token that closes a text, or none."""
    end = end_token(tokenizer)
    return [] if end is None else [end]
