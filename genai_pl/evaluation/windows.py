"""Texts become rows of tokens, each of which says what part of it is given and what part is scored."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from genai_pl.data.tokenize import encode_batch
from genai_pl.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ScoredWindow(NamedTuple):
    """Tokens of which the first `n_context` are given and each of the others is scored, given all before it."""

    tokens: np.ndarray
    n_context: int
    truncated: bool = False  # whether tokens were dropped on the left to fit the context

    @property
    def n_scored(self) -> int:
        return len(self.tokens) - self.n_context


def text_windows(
    texts: Sequence[str | None],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    seq_len: int,
    stride: int | None = None,
    bos: bool | None = None,
) -> list[ScoredWindow]:
    """The windows of every text; its first token is scored only where a bos precedes it."""
    stride = seq_len if stride is None else stride
    if not 1 <= stride <= seq_len:
        raise ConfigError(f"data.stride={stride} must lie between 1 and the window, {seq_len} tokens")
    start = np.asarray(bos_ids(tokenizer, bos), dtype=np.int32)
    documents = encode_batch({"text": list(texts)}, tokenizer, [])["input_ids"]
    return [row for ids in documents for row in windows(np.concatenate([start, ids]), seq_len=seq_len, stride=stride)]


def windows(tokens: np.ndarray, *, seq_len: int, stride: int) -> Iterator[ScoredWindow]:
    """Rows of at most seq_len + 1 tokens, `stride` apart, which score every token but the first exactly once."""
    scored = 1
    for start in range(0, len(tokens) - 1, stride):
        end = min(start + seq_len + 1, len(tokens))
        yield ScoredWindow(tokens[start:end], scored - start)
        if end == len(tokens):
            return
        scored = end


def completion_windows(
    prompts: Sequence[str],
    completions: Sequence[str],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    seq_len: int,
    bos: bool | None = None,
    owners: Sequence[int] | None = None,
) -> list[ScoredWindow]:
    """One row for each pair, split into tokens as lm-evaluation-harness does.

    Both are encoded together, whitespace that ends the prompt counts as the completion's, and the completion is what
    comes after as many tokens as the prompt alone has; where it merges with the prompt so far that none come after, it is
    encoded by itself, as one that is written is. A long prompt is cut on the left.
    owners: the number of each pair in what an error says; 1, 2, ... if left out.
    """
    owners = range(1, len(prompts) + 1) if owners is None else owners
    pairs = [_split_pair(*pair) for pair in zip(owners, prompts, completions, strict=True)]
    start = bos_ids(tokenizer, bos)
    given = _encode(tokenizer, [prompt for prompt, _ in pairs])
    whole = _encode(tokenizer, [prompt + completion for prompt, completion in pairs])
    rows = []
    for n, before, tokens, (_, completion) in zip(owners, given, whole, pairs, strict=True):
        if len(tokens) <= len(before):
            tokens = before + _encode(tokenizer, [completion])[0]
        prefix = start or ([] if before else bos_ids(tokenizer, True))
        rows.append(_completion_window(n, prefix + tokens, len(prefix + before), seq_len))
    return rows


def _split_pair(n: int, prompt: object, completion: object) -> tuple[str, str]:
    """Prompt and completion of row n, with the whitespace between them in the completion."""
    for name, value in (("prompt", prompt), ("completion", completion)):
        if not isinstance(value, str):
            raise DataError(f"row {n}: {name} is {type(value).__name__}, not text")
    if not completion:
        raise DataError(f"row {n}: completion is empty, there is nothing to score")
    stripped = prompt.rstrip()
    return stripped, prompt[len(stripped) :] + completion


def _completion_window(n: int, tokens: list[int], n_context: int, seq_len: int) -> ScoredWindow:
    n_scored = len(tokens) - n_context
    if n_scored < 1:
        raise DataError(f"row {n}: completion has no tokens, there is nothing to score")
    if n_scored > seq_len:
        raise DataError(f"row {n}: completion has {n_scored} tokens, more than the context of {seq_len}")
    kept = tokens[-(seq_len + 1) :]  # the model reads all but the last
    return ScoredWindow(np.asarray(kept, dtype=np.int32), len(kept) - n_scored, truncated=len(kept) < len(tokens))


def _encode(tokenizer: "PreTrainedTokenizerBase", texts: list[str]) -> list[list[int]]:
    # not verbose: the length of what it gives is dealt with here
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []


def bos_ids(tokenizer: "PreTrainedTokenizerBase", bos: bool | None) -> list[int]:
    """What every text begins with: one token (bos, or eos where there is no bos) or none; None leaves it to the tokenizer."""
    first = tokenizer.bos_token_id
    if bos is None:
        bos = first is not None and tokenizer("")["input_ids"][:1] == [first]
    if not bos:
        return []
    first = tokenizer.eos_token_id if first is None else first
    if first is None:
        raise ConfigError(
            "the tokenizer has neither a bos nor an eos token to begin with: set data.bos=false, and give prompts"
        )
    return [first]
