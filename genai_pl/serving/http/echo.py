"""Prompts in completions: their text and log-probabilities (`echo`), and a suffix after the answer (fill in the middle)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from genai_pl.data.tokenizer import FIM
from genai_pl.generation import Detokenizer
from genai_pl.models.onnx.model import is_onnx
from genai_pl.serving.engine.request import TokenOutput
from genai_pl.serving.engine.scoring import prompt_logprob_slices
from genai_pl.serving.errors import ApiError
from genai_pl.serving.http.schemas import CompletionBody
from genai_pl.serving.service import Service

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# prefix, middle and suffix token: ours and Qwen's, StarCoder's
FIM_TOKENS = (FIM, ("<fim_prefix>", "<fim_middle>", "<fim_suffix>"))


async def completion_prompts(service: Service, body: CompletionBody) -> list[tuple[int, ...]]:
    """Token ids of the prompts; with a suffix in the order prefix, suffix, middle (Bavarian et al. 2022, section 3).

    Raises ApiError 422 for a suffix where the tokenizer has no tokens for it.
    """
    if not body.suffix:
        return [await service.tokens(prompt) for prompt in body.prompts]
    vocab = service.tokenizer.get_vocab()
    names = next((names for names in FIM_TOKENS if all(name in vocab for name in names)), None)
    if names is None:
        raise ApiError(422, "suffix: this model has no tokens to fill in the middle", param="suffix")
    prefix_id, middle_id, suffix_id = (vocab[name] for name in names)
    suffix = await service.plain_tokens(body.suffix)
    prompts = []
    for prompt in body.prompts:
        whole = await service.plain_tokens(prompt) if isinstance(prompt, str) else service.check_token_ids(prompt)
        prompts.append((prefix_id, *whole, suffix_id, *suffix, middle_id))
    return prompts


async def echoed(
    service: Service, prompts: Sequence[tuple[int, ...]], adapter: str | None, logprobs: int | None
) -> list[list[TokenOutput]]:
    """The tokens of each prompt as outputs; with `logprobs` n their log-probabilities and those of the n likeliest.

    The first token of a prompt has none. Raises ApiError 400 for a model that gives no scores, or a prompt beyond its context.
    """
    if service.engine is None or service.has_two_stacks or is_onnx(service.path):
        raise ApiError(400, f"echo: {service.name} gives no log-probabilities of a prompt", param="echo")
    for tokens in prompts:
        if len(tokens) > service.context:
            raise ApiError(400, f"the prompt has {len(tokens)} tokens, the model reads at most {service.context}")
    texts = [await service.tokenize_threads.encode(token_texts, tokens, size=len(tokens) * 4) for tokens in prompts]
    if logprobs is None:
        return [
            [TokenOutput(text, token, None, ()) for text, token in zip(*pair, strict=True)]
            for pair in zip(texts, prompts, strict=True)
        ]
    service.rates.spend(sum(map(len, prompts)))
    slices = prompt_logprob_slices(service.model, prompts, logprobs)
    values = await service.scoring_queue.run(slices, adapter=adapter)
    return [
        [TokenOutput(text, token, *value) for text, token, value in zip(*triple, strict=True)]
        for triple in zip(texts, prompts, values, strict=True)
    ]


def token_texts(tokenizer: "PreTrainedTokenizerBase", tokens: Sequence[int]) -> list[str]:
    """The characters that each token completes; joined they are the text of all tokens."""
    detokenizer = Detokenizer(tokenizer, [])
    return [detokenizer.push(token) for token in tokens]
