"""Prompts in completions: their text and log-probabilities (`echo`), and a suffix after the answer (fill in the middle)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from genai_pl.data.prompt_tokens import begin_tokens
from genai_pl.generation import Detokenizer, find_format
from genai_pl.models.onnx.model import is_onnx
from genai_pl.serving.engine.request import TokenOutput
from genai_pl.serving.engine.scoring import prompt_logprob_slices
from genai_pl.serving.errors import ApiError
from genai_pl.serving.http.schemas import CompletionBody
from genai_pl.serving.service import Service

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


async def completion_prompts(service: Service, body: CompletionBody) -> tuple[list[tuple[int, ...]], list[str]]:
    """Token ids of the prompts, and texts that end their answers; with a suffix in the form that the model has learned.

    Raises ApiError 422 for a suffix where the tokenizer has no tokens for it.
    """
    if not body.suffix:
        return [await service.tokens(prompt) for prompt in body.prompts], []
    form = find_format(service.tokenizer)
    if form is None:
        raise ApiError(422, "suffix: this model has no tokens to fill in the middle", param="suffix")
    prompts = [await service.gap_tokens(form, prompt, body.suffix) for prompt in body.prompts]
    return prompts, form.stops


async def echoed(
    service: Service, body: CompletionBody, prompts: Sequence[tuple[int, ...]], adapter: str | None
) -> list[list[TokenOutput]]:
    """The tokens of each prompt of a body as outputs; with `logprobs` n their log-probabilities and those of the n likeliest.

    The first token of a prompt has none. Raises ApiError 400 for a model that gives no scores, or a prompt beyond its context.
    """
    if service.engine is None or service.has_two_stacks or is_onnx(service.path):
        raise ApiError(400, f"echo: {service.name} gives no log-probabilities of a prompt", param="echo")
    for tokens in prompts:
        if len(tokens) > service.context:
            raise ApiError(400, f"the prompt has {len(tokens)} tokens, the model reads at most {service.context}")
    texts = [
        await service.tokenize_threads.encode(token_texts, tokens, given, size=len(tokens) * 4)
        for tokens, given in zip(prompts, body.prompts, strict=True)
    ]
    if body.logprobs is None:
        return [
            [TokenOutput(text, token, None, ()) for text, token in zip(*pair, strict=True)]
            for pair in zip(texts, prompts, strict=True)
        ]
    service.rates.spend(sum(map(len, prompts)))
    slices = prompt_logprob_slices(service.model, prompts, body.logprobs)
    values = await service.scoring_queue.run(slices, adapter=adapter)
    return [
        [TokenOutput(text, token, *value) for text, token, value in zip(*triple, strict=True)]
        for triple in zip(texts, prompts, values, strict=True)
    ]


def token_texts(tokenizer: "PreTrainedTokenizerBase", tokens: Sequence[int], prompt: str | Sequence[int]) -> list[str]:
    """The characters that each token of a prompt completes; joined they are the prompt, special tokens by their names.

    Begin tokens that the tokenizer has put before a text have none.
    """
    is_text = isinstance(prompt, str)
    n_added = _n_added(tokenizer, tokens, prompt) if is_text else 0
    detokenizer = Detokenizer(tokenizer, [], with_special=True)
    texts = [""] * n_added + [detokenizer.push(token) for token in tokens[n_added:]]
    found = "".join(texts)
    if is_text and prompt.startswith(found):  # U+FFFD at the end, which is held back as half a character
        texts[-1] += prompt[len(found) :]
    return texts


def _n_added(tokenizer: "PreTrainedTokenizerBase", tokens: Sequence[int], text: str) -> int:
    """Number of the tokens in front of a text that are not in it."""
    if not text:
        return len(tokens)
    brings_its_own = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    return 0 if brings_its_own else len(begin_tokens(tokenizer))
