"""Metric modes: whether a greater value of a metric is the better one, and which metric of a task is shown first."""

from collections.abc import Collection

GREATER = {
    *(
        "accuracy",
        "accuracy_norm",
        "accuracy_per_token",
        "accuracies",
        "token_accuracy",
        "exact_match",
        "centered_accuracy",
        "win_rate",
        "score",
        "f1",
        "macro_f1",
    ),
    *("scores", "margins", "margin", "chosen", "rlhf_reward", "reward", "tokens_per_sec", "mfu", "recall", "precision"),
    *("ndcg", "mrr", "map", "auc", "spearman", "pearson", "mcc", "cosine_margin"),
}
LESS = {
    *("loss", "perplexity", "completion_perplexity", "bpb", "kl", "calibration_error", "nll", "grad_norm", "policy"),
    *("value", "approxkl", "mse", "mae", "rmse", "memory_gib", "data_wait", "error"),
}
HEADLINES = (  # metrics by which a task of evaluation is known, the first that it has
    *("exact_match", "pass@1", "win_rate", "score", "centered_accuracy", "accuracy", "loss"),
)
BOUNDS = ("_low", "_high")  # ends of the names of an interval


def headline(names: Collection[str]) -> str | None:
    """The metric by which a task is known, of those that it has; None for names that no task has.

    >>> headline(["accuracy_low", "accuracy", "loss"])
    'accuracy'
    """
    return next((name for name in HEADLINES if name in names), None)


def greater_is_better(name: str) -> bool | None:
    """True if a greater value is better, False if a lower one is, None where the name does not tell.

    The parts of a name count from its end, and of `recall@10` what stands before the sign.

    >>> greater_is_better("val/accuracy"), greater_is_better("val/loss/web"), greater_is_better("val/recall@1")
    (True, False, True)
    >>> greater_is_better("val/height") is None
    True
    """
    if "/loss/" in name:  # of a source, whatever its name
        return False
    for part in reversed(name.split("/")):
        word = part.partition("@")[0]
        if word in GREATER or word.startswith("pass"):
            return True
        if word in LESS:
            return False
    return None
