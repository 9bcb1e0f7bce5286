"""Scored windows: rows of tokens of which a first part is context and the rest is scored.

A text longer than the context is divided into overlapping windows (`stride` below seq_len gives each token more
context at more cost); every token but the first is scored exactly once. Completions are tokenized as in
lm-evaluation-harness, so numbers agree.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from genai_pl.data.tokenize import encode_batch
from genai_pl.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ScoredWindow(NamedTuple):
    """Tokens of which the first `n_context` are given, and each other is scored given all before it.

    tokens: (n,) ids. n_context: at least 1, as nothing predicts the first token.
    truncated: tokens were dropped on the left to fit the context.
    """

    tokens: np.ndarray
    n_context: int
    truncated: bool = False

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
    """The windows of every text; its first token is scored only where a bos precedes it.

    stride: tokens between window starts; None is seq_len. bos: begin every text with it; None follows the tokenizer.
    """
    stride = seq_len if stride is None else stride
    if not 1 <= stride <= seq_len:
        raise ConfigError(f"data.stride={stride} must lie between 1 and the window, {seq_len} tokens")
    start = np.asarray(bos_ids(tokenizer, bos), dtype=np.int32)
    documents = encode_batch({"text": list(texts)}, tokenizer, [])["input_ids"]
    return [row for ids in documents for row in windows(np.concatenate([start, ids]), seq_len=seq_len, stride=stride)]


def windows(tokens: np.ndarray, *, seq_len: int, stride: int) -> Iterator[ScoredWindow]:
    """Windows of at most seq_len + 1 tokens, `stride` apart, that score every token but the first exactly once.

    >>> [(w.tokens.tolist(), w.n_context) for w in windows(np.arange(6), seq_len=4, stride=2)]
    [([0, 1, 2, 3, 4], 1), ([2, 3, 4, 5], 3)]
    """
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
    """One window for each pair of prompt and completion, tokenized as lm-evaluation-harness does.

    Both are encoded together, and white space at the end of the prompt counts as the completion's. The completion is what
    follows as many tokens as the prompt alone has; where it merges with the prompt so far that none follow, it is encoded
    by itself, as in generation. A long prompt is truncated on the left.

    owners: the number of each pair for errors; 1, 2, ... by default.
    """
    owners = range(1, len(prompts) + 1) if owners is None else owners
    pairs = [_split_pair(*pair) for pair in zip(owners, prompts, completions, strict=True)]
    start = bos_ids(tokenizer, bos)
    prompt_ids = _encode(tokenizer, [prompt for prompt, _ in pairs])
    joint_ids = _encode(tokenizer, [prompt + completion for prompt, completion in pairs])
    windows = []
    for n, prompt_tokens, tokens, (_, completion) in zip(owners, prompt_ids, joint_ids, pairs, strict=True):
        if len(tokens) <= len(prompt_tokens):
            tokens = prompt_tokens + _encode(tokenizer, [completion])[0]
        prefix = start or ([] if prompt_tokens else bos_ids(tokenizer, True))
        windows.append(_completion_window(n, prefix + tokens, len(prefix + prompt_tokens), seq_len))
    return windows


def _split_pair(n: int, prompt: object, completion: object) -> tuple[str, str]:
    """Prompt and completion of row n, with the white space between them in the completion."""
    for name, value in (("prompt", prompt), ("completion", completion)):
        if not isinstance(value, str):
            raise DataError(f"row {n}: {name} is {type(value).__name__}, not text")
    if not completion:
        raise DataError(f"row {n}: completion is empty, there is nothing to score")
    stripped = prompt.rstrip()
    return stripped, prompt[len(stripped) :] + completion


def _completion_window(n: int, tokens: list[int], n_context: int, seq_len: int) -> ScoredWindow:
    """The window of a prompt of n_context tokens and its completion; DataError where the latter is empty or too long."""
    n_scored = len(tokens) - n_context
    if n_scored < 1:
        raise DataError(f"row {n}: completion has no tokens, there is nothing to score")
    if n_scored > seq_len:
        raise DataError(f"row {n}: completion has {n_scored} tokens, more than the context of {seq_len}")
    window = tokens[-(seq_len + 1) :]  # the model reads all but the last
    return ScoredWindow(np.asarray(window, dtype=np.int32), len(window) - n_scored, truncated=len(window) < len(tokens))


def _encode(tokenizer: "PreTrainedTokenizerBase", texts: list[str]) -> list[list[int]]:
    """Token ids without special tokens."""
    # not verbose: lengths are checked by the callers
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []


def bos_ids(tokenizer: "PreTrainedTokenizerBase", bos: bool | None) -> list[int]:
    """The tokens in front of every text: one (bos, or eos without a bos) or none; bos=None does what the tokenizer does."""
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
