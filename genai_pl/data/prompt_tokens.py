"""Tokens of prompts and answers: the one place that decides what a model is prompted with and what it learns to produce.

Training, evaluation, generation, serving, rollouts and reward models all call these functions, so a prompt has the same
tokens everywhere. Three rules:

- A text prompt is tokenized with the special tokens that the tokenizer puts in front, and without an end token.
- A completion is tokenized as a continuation and closed by the end token, which is learned: else a model never stops.
- A conversation is rendered and tokenized as one text; tokens that begin inside an assistant's span are learned. Only
  where the generation prompt alone has other tokens than the text has there, the text is tokenized in two parts.
"""

from collections.abc import Mapping, Sequence
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
    "begin_tokens",
    "encode_answers",
    "encode_completion",
    "encode_completions",
    "encode_conversations",
    "encode_masked_answers",
    "encode_messages",
    "encode_prompt",
    "encode_prompts",
    "ensure_template",
    "prompt_text",
    "turn_end_token",
]


class TokenizedExample(NamedTuple):
    """The tokens of one training example.

    input_ids: (n,) int32. loss_mask: (n,) bool, True where the model is to produce the token.
    """

    input_ids: np.ndarray
    loss_mask: np.ndarray

    @property
    def n_prompt(self) -> int:
        """The number of tokens before the first one that is learned; all of them if none is."""
        return int(self.loss_mask.argmax()) if self.loss_mask.any() else len(self.loss_mask)


def encode_messages(tokenizer: "PreTrainedTokenizerBase", messages: Messages, tools: Tools = ()) -> TokenizedExample:
    """The rendered conversation, in which assistants' turns are learned, including the marker that ends each."""
    return encode_conversations(tokenizer, [messages], [0], [tools])[0]


def encode_conversations(
    tokenizer: "PreTrainedTokenizerBase",
    conversations: Sequence[Messages],
    n_prompt: Sequence[int],
    tools: Sequence[Tools] | None = None,
) -> list[TokenizedExample]:
    """`encode_messages` for each conversation; the first `n_prompt` messages of each are not learned.

    tools: those of each conversation, or None.

    The tokens are those of the whole text, as transformers makes them, except where the generation prompt alone has others
    than it has in front of the answer (a space that joins the first word, line breaks that merge at the end of a text). There
    the prompt's tokens end, as they do when the model is prompted, and the answer's begin.
    """
    template = ChatTemplate(tokenizer)
    # render all, then tokenize all at once
    rows = zip(conversations, n_prompt, _tools_per_row(tools, len(conversations)), strict=True)
    rendered = [template.render_with_spans(messages, n, row_tools) for messages, n, row_tools in rows]
    encoded = encode_with_boundaries(tokenizer, [(r.text, [start for start, _ in r.spans]) for r in rendered])
    end = _end_ids(tokenizer)
    return [_masked(*tokens, rendering, end) for tokens, rendering in zip(encoded, rendered, strict=True)]


def encode_completion(
    tokenizer: "PreTrainedTokenizerBase", prompt: str | Messages, completion: str | Messages, tools: Tools = ()
) -> TokenizedExample:
    """A prompt and its completion, which is learned with the end token after it; or both as messages."""
    return encode_completions(tokenizer, [prompt], [completion], [tools])[0]


def encode_completions(
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str | Messages],
    completions: Sequence[str | Messages],
    tools: Sequence[Tools] | None = None,
) -> list[TokenizedExample]:
    """`encode_completion` for each pair; prompts are texts, or all of them messages."""
    if prompts and not isinstance(prompts[0], str):
        conversations = [
            [*prompt, *as_messages(completion)] for prompt, completion in zip(prompts, completions, strict=True)
        ]
        return encode_conversations(tokenizer, conversations, [len(prompt) for prompt in prompts], tools)
    end = _end_ids(tokenizer)
    answers = encode_continuations(tokenizer, completions)
    parts = [
        (prompt_ids, np.asarray([*answer, *end], dtype=np.int32))
        for prompt_ids, answer in zip(encode_prompts(tokenizer, prompts), answers, strict=True)
    ]
    return [TokenizedExample(np.concatenate(part), np.arange(sum(map(len, part))) >= len(part[0])) for part in parts]


def encode_answers(
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str | Messages],
    answers: Sequence[Sequence[str | Messages]],
    tools: Sequence[Tools] | None = None,
) -> list[tuple[np.ndarray, list[np.ndarray]]]:
    """(prompt ids, [ids of each answer]) for prompts with several answers; prompt + answer equals `encode_completions`.

    DataError where the template renders one prompt differently before two answers: their comparison would include that.
    """
    rows = encode_masked_answers(tokenizer, prompts, answers, tools)
    return [(prompt, [answer.input_ids for answer in examples]) for prompt, examples in rows]


def encode_masked_answers(
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str | Messages],
    answers: Sequence[Sequence[str | Messages]],
    tools: Sequence[Tools] | None = None,
) -> list[tuple[np.ndarray, list[TokenizedExample]]]:
    """`encode_answers` with a loss mask for each answer: False for turns of tools and users in it, and what is around them."""
    # encode every (prompt, answer) pair in one call
    prompt_numbers = [n for n, group in enumerate(answers) for _ in group]
    row_tools = _tools_per_row(tools, len(prompts))
    flat_answers = [answer for group in answers for answer in group]
    examples = iter(
        encode_completions(
            tokenizer, [prompts[n] for n in prompt_numbers], flat_answers, [row_tools[n] for n in prompt_numbers]
        )
    )
    rows = []
    for group in answers:
        # divide each row's examples into the shared prompt and the answers
        examples_of_row = [next(examples) for _ in group]
        n_prompt = min((example.n_prompt for example in examples_of_row), default=0)
        # the shared prompt is the shortest part that no example learns
        beginnings = {example.input_ids[:n_prompt].tobytes() for example in examples_of_row}
        if len(beginnings) > 1:
            raise DataError("messages: the chat template renders the prompt otherwise before another answer")
        prompt = examples_of_row[0].input_ids[:n_prompt] if examples_of_row else np.zeros(0, np.int32)
        # an answer of the assistant alone counts whole, with what the template writes after it
        masks = [
            example.loss_mask[n_prompt:]
            if _has_other_turns(answer)
            else np.ones(len(example.input_ids) - n_prompt, bool)
            for answer, example in zip(group, examples_of_row, strict=True)
        ]
        ids = [example.input_ids[n_prompt:] for example in examples_of_row]
        rows.append((prompt, list(map(TokenizedExample, ids, masks))))
    return rows


def _has_other_turns(answer: str | Messages) -> bool:
    """Whether an answer has turns of others than the assistant: of tools, or of a user."""
    return not isinstance(answer, str) and any(message["role"] != "assistant" for message in answer)


def encode_prompt(
    tokenizer: "PreTrainedTokenizerBase",
    prompt: str | Messages,
    tools: Tools = (),
    template: ChatTemplate | None = None,
    variables: Mapping[str, object] | None = None,
) -> np.ndarray:
    """The tokens (n,) int32 that a model continues: of a text, or of messages with the generation prompt.

    template: a `ChatTemplate` of the tokenizer, to reuse what it has found out. variables: for it, see `template_options`.
    """
    return encode_prompts(tokenizer, [prompt], [tools], template, variables)[0]


def begin_tokens(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The special tokens that the tokenizer puts in front of a text."""
    return encode_prompt(tokenizer, "").tolist()


def encode_prompts(
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str | Messages],
    tools: Sequence[Tools] | None = None,
    template: ChatTemplate | None = None,
    variables: Mapping[str, object] | None = None,
) -> list[np.ndarray]:
    """`encode_prompt` for each prompt; they are texts, or all of them messages."""
    if not prompts or isinstance(prompts[0], str):
        rows = tokenizer(list(prompts), **NO_WARNINGS)["input_ids"]
        end = _end_ids(tokenizer)
        if appends_end_token(tokenizer):  # a tokenizer may close every text: an end token would stop the continuation
            rows = [ids[:-1] if ids[-1:] == end else ids for ids in rows]
        begin = [tokenizer.bos_token_id] * 2  # a text that is a rendered conversation brings its own bos: keep one
        rows = [ids[1:] if ids[:2] == begin else ids for ids in rows]
    else:
        template = template or ChatTemplate(tokenizer)
        pairs = zip(prompts, _tools_per_row(tools, len(prompts)), strict=True)
        texts = [template.prompt(*pair, variables) for pair in pairs]
        rows = tokenizer(texts, add_special_tokens=False, **NO_WARNINGS)["input_ids"]
    return [np.asarray(ids, dtype=np.int32) for ids in rows]


def prompt_text(tokenizer: "PreTrainedTokenizerBase", prompt: str | Messages, tools: Tools = ()) -> str:
    """A prompt as text: messages are rendered with the generation prompt."""
    return prompt if isinstance(prompt, str) else ChatTemplate(tokenizer).prompt(prompt, tools)


def _masked(ids: Sequence[int], starts: np.ndarray, rendering: Rendering, end: Sequence[int]) -> TokenizedExample:
    """The example of a rendered conversation: a token is learned if its first character is inside a span.

    ids, starts: of the tokens of the text. end: ids of the end token, which closes an answer that no marker closes.
    """
    mask = np.zeros(len(starts), bool)
    for start, stop in rendering.spans:
        mask |= (starts >= start) & (starts < stop)
    if rendering.is_unclosed and rendering.spans:
        ids, mask = [*ids, *end], np.concatenate([mask, np.ones(len(end), bool)])
    return TokenizedExample(np.asarray(ids, dtype=np.int32), mask)


def as_messages(completion: str | Messages) -> Messages:
    """An answer as messages: a text is one message of the assistant."""
    return [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion


def _tools_per_row(tools: Sequence[Tools] | None, n: int) -> Sequence[Tools]:
    """The tools of each of n conversations, none by default."""
    return [()] * n if tools is None else tools


def _end_ids(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The end token as a list of one id, or of none."""
    end = end_token(tokenizer)
    return [] if end is None else [end]
