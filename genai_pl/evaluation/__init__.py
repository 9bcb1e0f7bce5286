"""How well a model predicts or judges: texts become rows, rows get log-likelihoods or scores, those become metrics."""

from genai_pl.evaluation.choices import Question, choice_metrics, choice_rows
from genai_pl.evaluation.embeddings import judge
from genai_pl.evaluation.examples import Kind, naming, read_examples
from genai_pl.evaluation.metrics import Metrics, completion_metrics, text_metrics
from genai_pl.evaluation.preferences import conversation_rows, pair_metrics, pair_rows, share
from genai_pl.evaluation.scoring import Scores, score
from genai_pl.evaluation.windows import ScoredWindow, completion_rows, text_rows

__all__ = [
    "Kind",
    "Metrics",
    "Question",
    "ScoredWindow",
    "Scores",
    "choice_metrics",
    "choice_rows",
    "completion_metrics",
    "completion_rows",
    "conversation_rows",
    "judge",
    "naming",
    "pair_metrics",
    "pair_rows",
    "read_examples",
    "score",
    "share",
    "text_metrics",
    "text_rows",
]
