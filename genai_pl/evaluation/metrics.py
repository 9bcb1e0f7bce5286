"""Metrics of scored windows: perplexity, bits per byte, accuracies with intervals, calibration.

All are sums over tokens or windows divided once at the end, so batch sizes do not matter.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from genai_pl.evaluation.scoring import Scores
from genai_pl.evaluation.windows import ScoredWindow

Metrics = dict[str, float]
Z = 1.959964  # standard deviations of a 95 % interval
BINS = 15  # of confidence, as in Guo et al. 2017


def text_metrics(scores: Scores, rows: Sequence[ScoredWindow], token_bytes: Sequence[int]) -> Metrics:
    """Metrics per token: loss in nats, perplexity, share of most likely tokens, calibration error; and bits per byte (bpb).

    token_bytes: (V,) UTF-8 bytes that each token stands for. bpb compares models with different tokenizers.
    """
    n_tokens = sum(row.n_scored for row in rows)
    table = np.asarray(token_bytes)
    n_bytes = sum(int(table[row.tokens[row.n_context :]].sum()) for row in rows)
    total = scores.nll.sum()
    loss = total / n_tokens
    return {
        "loss": loss.item(),
        "perplexity": loss.exp().item(),
        "bpb": (total / (math.log(2) * n_bytes)).item() if n_bytes else math.nan,
        "token_accuracy": scores.hits.sum().item() / n_tokens,
        "calibration_error": calibration_error(scores.confidence, scores.correct),
    }


def completion_metrics(scores: Scores, rows: Sequence[ScoredWindow], token_bytes: Sequence[int]) -> Metrics:
    """`text_metrics`, and per completion the share that greedy decoding would give and the exp of the mean loss.

    The last two are what lm-evaluation-harness calls accuracy and perplexity of LAMBADA (Paperno et al. 2016).
    """
    n_scored = torch.tensor([row.n_scored for row in rows])
    return {
        **text_metrics(scores, rows, token_bytes),
        "completion_perplexity": scores.nll.mean().exp().item(),
        **with_interval("accuracy", (scores.hits == n_scored).double().mean().item(), len(rows)),
    }


def calibration_error(confidence: Tensor, correct: Tensor) -> float:
    """The expected calibration error (Guo et al. 2017, eq. 3) of probabilities (N,) whose predictions are correct or not (N,).

    The mean over tokens of |accuracy - confidence| of their bin, one of 15 of equal width.
    """
    from torchmetrics.functional.classification import binary_calibration_error

    return binary_calibration_error(confidence, correct.long(), n_bins=BINS).item()


def with_interval(name: str, share: float, n: int) -> Metrics:
    """A share of n under its name, with the ends of Wilson's interval as NAME_low and NAME_high."""
    low, high = wilson(share, n)
    return {name: share, f"{name}_low": low, f"{name}_high": high}


def mean_interval(name: str, values: Sequence[float]) -> Metrics:
    """A mean of numbers under its name, with its normal 95 % interval as NAME_low and NAME_high (NaN for a single number).

    >>> [round(end, 2) for end in mean_interval("score", [1.0, 2.0, 3.0]).values()]
    [2.0, 0.87, 3.13]
    """
    numbers = np.asarray(values, dtype=np.float64)
    mean = numbers.mean().item()
    width = Z * numbers.std(ddof=1).item() / math.sqrt(len(numbers)) if len(numbers) > 1 else math.nan
    return {name: mean, f"{name}_low": mean - width, f"{name}_high": mean + width}


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that one of k samples is right, of n samples of which c are: 1 - C(n-c, k) / C(n, k).

    The unbiased estimator of pass@k (Chen et al. 2021, eq. 1), as a product that does not overflow.

    >>> round(pass_at_k(5, 1, 2), 3), pass_at_k(5, 0, 2), pass_at_k(5, 4, 2)
    (0.4, 0.0, 1.0)
    """
    return 1.0 - math.prod(1.0 - k / i for i in range(n - c + 1, n + 1)) if n - c >= k else 1.0


def wilson(share: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a share of n (Wilson 1927); unlike the normal one it stays within 0 and 1 and works for small n.

    >>> [round(end, 3) for end in wilson(0.5, 10)]
    [0.237, 0.763]
    >>> wilson(0.0, 7)[0], wilson(1.0, 7)[1]
    (0.0, 1.0)
    """
    middle, width = share + Z**2 / (2 * n), Z * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    low, high = (middle - width) / (1 + Z**2 / n), (middle + width) / (1 + Z**2 / n)
    return max(low, 0.0), min(high, 1.0)  # rounding may leave the ends of a share of 0 or 1 outside
