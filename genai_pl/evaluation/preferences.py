"""Preference evaluation: how often a model prefers the completion that people preferred, and how much length explains.

Windows are tokenized by the functions of training (`prompt_tokens`), so a model is measured on what it was trained on.
`longer_is_better` and `length_correlation` are reported beside the accuracy, because reward models learn to prefer length.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from genai_pl.data.prompt_tokens import (
    Messages,
    TokenizedExample,
    Tools,
    encode_completion,
    encode_completions,
    encode_conversations,
)
from genai_pl.errors import DataError
from genai_pl.evaluation.examples import Conversation
from genai_pl.evaluation.metrics import with_interval
from genai_pl.evaluation.windows import ScoredWindow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def reward_tokens(
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str | Messages],
    completions: Sequence[str],
    tools: Sequence[Tools] | None = None,
) -> list[np.ndarray]:
    """The token ids that a reward model reads of each prompt and its completion, as in its training."""
    return [example.input_ids for example in _examples(tokenizer, prompts, completions, tools)]


def _examples(
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str | Messages],
    completions: Sequence[str | Messages],
    tools: Sequence[Tools] | None,
) -> list[TokenizedExample]:
    """Prompts with completions as in training; in one call where all prompts are of one type."""
    if len({isinstance(prompt, str) for prompt in prompts}) == 1:
        return encode_completions(tokenizer, prompts, completions, tools)
    rows = zip(prompts, completions, [()] * len(prompts) if tools is None else tools, strict=True)
    return [encode_completion(tokenizer, *row) for row in rows]


def pair_windows(
    prompts: Sequence[object],
    completions: Sequence[object],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    seq_len: int,
    judges: bool = False,
    tools: Sequence[Tools] | None = None,
) -> list[ScoredWindow]:
    """Windows of prompts with their completions, the end token included; long prompts are truncated on the left.

    judges: the model is a reward model, which reads all tokens of a window; a language model reads all but the last.
    DataError for an empty prompt, and for a completion that exceeds the context.
    """
    max_tokens = seq_len if judges else seq_len + 1
    windows = []
    for n, example in enumerate(_examples(tokenizer, prompts, completions, tools), start=1):
        n_prompt = example.n_prompt
        if n_prompt < 1:
            raise DataError(f"row {n}: an empty prompt")
        n_scored = len(example.input_ids) - n_prompt
        if n_scored >= max_tokens:
            raise DataError(f"row {n}: a completion has {n_scored} tokens, more than the context of {seq_len}")
        tokens = example.input_ids[-max_tokens:]
        windows.append(ScoredWindow(tokens, len(tokens) - n_scored, truncated=len(tokens) < len(example.input_ids)))
    return windows


def conversation_windows(
    conversations: Sequence[Conversation], tokenizer: "PreTrainedTokenizerBase", *, seq_len: int
) -> list[ScoredWindow]:
    """One window for each assistant turn that training would learn, given everything before it; truncated on the left.

    The loss mask has one run of True per turn; its edges are the differences of the mask.
    """
    examples = encode_conversations(tokenizer, *map(list, zip(*conversations, strict=True)))
    windows = []
    for n, (ids, mask) in enumerate(examples, start=1):
        edges = np.flatnonzero(np.diff(mask.astype(np.int8), prepend=0, append=0))
        for start, end in edges.reshape(-1, 2).tolist():
            if end - start > seq_len:
                raise DataError(f"row {n}: an answer has {end - start} tokens, more than the context of {seq_len}")
            tokens = ids[max(0, end - seq_len - 1) : end]
            if start:  # nothing predicts the first token of a conversation
                windows.append(ScoredWindow(tokens, len(tokens) - (end - start), truncated=len(tokens) < end))
    return windows


def pair_metrics(chosen: Tensor, rejected: Tensor, lengths: Tensor) -> dict[str, float]:
    """Metrics of the values (N,) that a model gives to both completions of N pairs, whose lengths are (N, 2).

    accuracy: the share of pairs whose chosen completion has the higher value, ties counting half, with Wilson's 95 %
    interval. margin: the mean difference. longer_is_better: the accuracy of length alone. length_correlation: between
    differences of values and of lengths.
    """
    longer = (lengths[:, 0] - lengths[:, 1]).double()
    return {
        **with_interval("accuracy", win_rate(chosen - rejected), len(chosen)),
        "margin": (chosen - rejected).mean().item(),
        "longer_is_better": win_rate(longer),
        "length_correlation": correlation(chosen - rejected, longer),
    }


def win_rate(difference: Tensor) -> float:
    """The share of differences (N,) that are positive; 0 counts half.

    >>> from torch import tensor
    >>> win_rate(tensor([1.0, 0.0, -1.0, 2.0]))
    0.625
    """
    return ((difference > 0).double() + (difference == 0).double() / 2).mean().item()


def correlation(a: Tensor, b: Tensor) -> float:
    """Pearson's correlation of (N,) and (N,); NaN where one of them is constant."""
    if len(a) < 2 or float(a.std()) == 0 or float(b.std()) == 0:
        return math.nan
    return float(np.corrcoef(a.numpy(), b.numpy())[0, 1])
