"""Evaluation: texts become windows of tokens, windows get log-likelihoods or rewards, and these become metrics.

`examples` reads a source, whose columns decide what is measured; `windows`, `choices` and `preferences` make
`ScoredWindow`s; `scoring` and `embeddings` run the model on them in batches; `metrics` and its neighbours reduce the
scores. In `generative` the model writes, and its completions are scored; `core` is the shipped set. `harness` runs tasks
of lm-evaluation-harness instead.
"""

from genai_pl.evaluation.choices import Question, choice_metrics, choice_windows
from genai_pl.evaluation.embeddings import reward_scores
from genai_pl.evaluation.examples import Kind, name_path_in_errors, read_examples
from genai_pl.evaluation.metrics import Metrics, completion_metrics, text_metrics
from genai_pl.evaluation.preferences import conversation_windows, pair_metrics, pair_windows, win_rate
from genai_pl.evaluation.scoring import Scores, score
from genai_pl.evaluation.windows import ScoredWindow, completion_windows, text_windows

__all__ = [
    "Kind",
    "Metrics",
    "Question",
    "ScoredWindow",
    "Scores",
    "choice_metrics",
    "choice_windows",
    "completion_metrics",
    "completion_windows",
    "conversation_windows",
    "reward_scores",
    "name_path_in_errors",
    "pair_metrics",
    "pair_windows",
    "read_examples",
    "score",
    "win_rate",
    "text_metrics",
    "text_windows",
]
