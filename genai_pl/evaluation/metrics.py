"""Scores become the numbers that papers report."""

import math
from collections.abc import Sequence

import numpy as np
import torch

from genai_pl.evaluation.rows import Row
from genai_pl.evaluation.scoring import Scores

Metrics = dict[str, float]


def text_metrics(scores: Scores, rows: Sequence[Row], token_bytes: Sequence[int]) -> Metrics:
    """Per token: loss in nats, perplexity, share of most likely tokens; bits per byte of the text that was scored.

    token_bytes: UTF-8 bytes of text that each token stands for, (V,).
    """
    n_tokens = sum(row.n_scored for row in rows)
    table = np.asarray(token_bytes)
    n_bytes = sum(int(table[row.tokens[row.n_given :]].sum()) for row in rows)
    total = scores.nll.sum()
    loss = total / n_tokens
    return {
        "loss": loss.item(),
        "perplexity": loss.exp().item(),
        "bpb": (total / (math.log(2) * n_bytes)).item() if n_bytes else math.nan,
        "token_accuracy": scores.hits.sum().item() / n_tokens,
    }


def completion_metrics(scores: Scores, rows: Sequence[Row], token_bytes: Sequence[int]) -> Metrics:
    """Those of `text_metrics`, and per completion: share that greedy decoding would give, exp of the mean loss.

    Both are what lm-evaluation-harness calls accuracy and perplexity of LAMBADA (Paperno et al. 2016).
    """
    n_scored = torch.tensor([row.n_scored for row in rows])
    return {
        **text_metrics(scores, rows, token_bytes),
        "completion_perplexity": scores.nll.mean().exp().item(),
        "accuracy": (scores.hits == n_scored).double().mean().item(),
    }
