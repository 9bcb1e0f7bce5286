"""How often a model prefers what people preferred, how sure that figure is, and what length has to do with it."""

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
    """The tokens that a reward model reads of each prompt and its completion, as in its training."""
    return [example.input_ids for example in _examples(tokenizer, prompts, completions, tools)]


def _examples(
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str | Messages],
    completions: Sequence[str | Messages],
    tools: Sequence[Tools] | None,
) -> list[TokenizedExample]:
    """Prompts with their completions as in training; all at once where all are texts or all messages."""
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
    """Rows of prompts with their completions as in training, the end token included; long prompts are cut on the left.

    A model that judges reads all tokens of a row, one that predicts all but the last.
    """
    room = seq_len if judges else seq_len + 1
    rows = []
    for n, example in enumerate(_examples(tokenizer, prompts, completions, tools), start=1):
        n_prompt = example.n_prompt
        if n_prompt < 1:
            raise DataError(f"row {n}: an empty prompt")
        n_scored = len(example.input_ids) - n_prompt
        if n_scored >= room:
            raise DataError(f"row {n}: a completion has {n_scored} tokens, more than the context of {seq_len}")
        kept = example.input_ids[-room:]
        rows.append(ScoredWindow(kept, len(kept) - n_scored, truncated=len(kept) < len(example.input_ids)))
    return rows


def conversation_windows(
    conversations: Sequence[Conversation], tokenizer: "PreTrainedTokenizerBase", *, seq_len: int
) -> list[ScoredWindow]:
    """A row for each turn of an assistant that training would learn, given all before it; cut on the left to seq_len."""
    examples = encode_conversations(tokenizer, *map(list, zip(*conversations, strict=True)))
    rows = []
    for n, (ids, mask) in enumerate(examples, start=1):
        edges = np.flatnonzero(np.diff(mask.astype(np.int8), prepend=0, append=0))
        for start, end in edges.reshape(-1, 2).tolist():
            if end - start > seq_len:
                raise DataError(f"row {n}: an answer has {end - start} tokens, more than the context of {seq_len}")
            kept = ids[max(0, end - seq_len - 1) : end]
            if start:  # nothing precedes the first token of all
                rows.append(ScoredWindow(kept, len(kept) - (end - start), truncated=len(kept) < end))
    return rows


def pair_metrics(chosen: Tensor, rejected: Tensor, lengths: Tensor) -> dict[str, float]:
    """Of what (N,) a model gives to both completions of a pair, whose lengths are (N, 2).

    accuracy: the share of pairs in which the chosen one gets more, with Wilson's 95 % interval; a tie is half a pair.
    longer_is_better: the accuracy of length alone. length_correlation: of differences in score with those in length.
    """
    longer = (lengths[:, 0] - lengths[:, 1]).double()
    return {
        **with_interval("accuracy", win_rate(chosen - rejected), len(chosen)),
        "margin": (chosen - rejected).mean().item(),
        "longer_is_better": win_rate(longer),
        "length_correlation": correlation(chosen - rejected, longer),
    }


def win_rate(difference: Tensor) -> float:
    """How many differences (N,) are positive, as a share; 0 counts half."""
    return ((difference > 0).double() + (difference == 0).double() / 2).mean().item()


def correlation(a: Tensor, b: Tensor) -> float:
    """Pearson's, of (N,) and (N,); not a number where one of them never changes."""
    if len(a) < 2 or float(a.std()) == 0 or float(b.std()) == 0:
        return math.nan
    return float(np.corrcoef(a.numpy(), b.numpy())[0, 1])
