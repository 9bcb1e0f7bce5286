"""How well a model predicts or judges: texts become rows, rows get log-likelihoods or scores, those become metrics."""

from genai_pl.evaluation.metrics import completion_metrics, text_metrics
from genai_pl.evaluation.preferences import pair_metrics, pair_rows, share
from genai_pl.evaluation.rows import Row, completion_rows, text_rows
from genai_pl.evaluation.scoring import Scores, score
from genai_pl.evaluation.vectors import judge

__all__ = [
    "Row",
    "Scores",
    "completion_metrics",
    "completion_rows",
    "judge",
    "pair_metrics",
    "pair_rows",
    "score",
    "share",
    "text_metrics",
    "text_rows",
]
