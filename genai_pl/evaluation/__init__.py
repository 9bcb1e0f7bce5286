"""How well a decoder predicts: texts become rows, rows get log-likelihoods, those become metrics."""

from genai_pl.evaluation.metrics import completion_metrics, text_metrics
from genai_pl.evaluation.rows import Row, completion_rows, text_rows
from genai_pl.evaluation.scoring import Scores, score

__all__ = ["Row", "Scores", "completion_metrics", "completion_rows", "score", "text_metrics", "text_rows"]
