"""Evaluation tasks: rows of a source that a model is measured on, tokenized once and scored whenever asked.

`evaluate.py` measures one task of a trained model, `callbacks/benchmarks.py` several while a model trains: both run
`measure`. Rows of a `Task` are read by the model alone; of a `GenerativeTask` it continues the prompts; `CoreTask` is the
shipped set.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch

from genai_pl.config.enums import Head
from genai_pl.data import token_bytes
from genai_pl.errors import ConfigError, DataError
from genai_pl.evaluation.choices import choice_metrics, choice_windows
from genai_pl.evaluation.core import CoreTask, core_metrics
from genai_pl.evaluation.embeddings import reward_scores
from genai_pl.evaluation.examples import Kind, name_path_in_errors
from genai_pl.evaluation.generative import GenerativeTask, Keep, measure_generative
from genai_pl.evaluation.metrics import Metrics, completion_metrics, text_metrics
from genai_pl.evaluation.preferences import conversation_windows, pair_metrics, pair_windows, win_rate
from genai_pl.evaluation.scoring import score
from genai_pl.evaluation.windows import ScoredWindow, completion_windows, text_windows
from genai_pl.models import Model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


TOKEN_METRICS = ("loss", "perplexity", "bpb", "token_accuracy", "calibration_error")
ACCURACY = ("accuracy", "accuracy_low", "accuracy_high")
PAIR_METRICS = (*ACCURACY, "margin", "longer_is_better", "length_correlation")
METRICS = {  # names by kind
    Kind.text: TOKEN_METRICS,
    Kind.completions: (*TOKEN_METRICS, "completion_perplexity", *ACCURACY),
    Kind.conversations: (*TOKEN_METRICS, "completion_perplexity", *ACCURACY),
    Kind.choices: (*ACCURACY, "accuracy_norm", "accuracy_norm_low", "accuracy_norm_high", "chance"),
    Kind.preferences: PAIR_METRICS,
}


class Task(NamedTuple):
    """Tokenized rows of a task.

    kind, columns: of the data, as `read_examples` returns them. rows: windows with the position of their first scored
    token. judges: whether a reward model scores.
    """

    kind: Kind
    columns: list[list]
    rows: list[ScoredWindow]
    judges: bool = False

    @property
    def counts(self) -> dict[str, int]:
        """Rows of the data, scored tokens, and prompts that were cut."""
        scored, cut = sum(row.n_scored for row in self.rows), sum(row.truncated for row in self.rows)
        return {"rows": len(self.columns[0]), "tokens": scored, "cut": cut}

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Names of its metrics."""
        of_pairs = self.kind is Kind.preferences and not self.judges
        return (*METRICS[self.kind], *(("accuracy_per_token",) if of_pairs else ()))


AnyTask = Task | GenerativeTask | CoreTask


def n_rows(task: AnyTask) -> int:
    """How many times in all `on_batch` counts, for a progress bar."""
    return len(task.rows) * (1 + task.samples) if isinstance(task, GenerativeTask) else len(task.rows)


def build_task(
    path: str,
    kind: Kind,
    columns: list[list],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    seq_len: int,
    judges: bool,
    stride: int | None = None,
    bos: bool | None = None,
) -> Task:
    """The task of these columns; DataError if there is no token to score.

    path: of the data, for errors. seq_len: tokens of a row at most. judges: whether a reward model scores. stride, bos:
    of `text_windows`.
    """
    if kind is not Kind.text and stride is not None:
        raise ConfigError(f"data.stride={stride}: prompts and completions have no windows; leave it out")
    with name_path_in_errors(path):
        # windows for texts; one row for every other example
        if kind is Kind.text:
            rows = text_windows(*columns, tokenizer, seq_len=seq_len, stride=stride, bos=bos)
        elif kind is Kind.completions:
            rows = completion_windows(*columns, tokenizer, seq_len=seq_len, bos=bos)
        elif kind is Kind.conversations:
            rows = conversation_windows(*columns, tokenizer, seq_len=seq_len)
        elif kind is Kind.choices:
            rows = choice_windows(*columns, tokenizer, seq_len=seq_len, bos=bos)
        else:
            prompts, chosen, rejected, tools = columns
            rows = pair_windows(
                prompts * 2, chosen + rejected, tokenizer, seq_len=seq_len, judges=judges, tools=tools * 2
            )
    if not rows:
        raise DataError(f"data.path={path}: there is no token to score; a text needs two, or data.bos=true")
    return Task(kind, columns, rows, judges)


def measure(
    task: AnyTask,
    model: Model,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    batch_tokens: int,
    on_batch: Callable[[int], object] | None = None,
    keep: Keep | None = None,
) -> Metrics:
    """Metrics of the model on a task: losses and perplexity, accuracies with intervals, or a share of pairs.

    batch_tokens: tokens of a batch, padding included. on_batch: called with the number of rows after every batch.
    keep: receives the completions of a generative task.
    """
    options = {"batch_tokens": batch_tokens, "on_batch": on_batch}
    if isinstance(task, GenerativeTask):
        return measure_generative(task, model, tokenizer, **options, keep=keep)
    if isinstance(task, CoreTask):
        return core_metrics(score(model, task.rows, **options).nll, task.questions)
    if task.kind is Kind.preferences:
        return _preference_metrics(task, model, **options)
    scores = score(model, task.rows, **options)
    if task.kind is Kind.choices:
        return choice_metrics(scores.nll, task.columns[0])
    metrics = text_metrics if task.kind is Kind.text else completion_metrics
    return metrics(scores, task.rows, token_bytes(tokenizer, model.config.vocab_size))


def _preference_metrics(task: Task, model: Model, **options: object) -> Metrics:
    """Share of pairs whose chosen completion gets the higher reward, or else the higher log-probability, and margins.

    The rows are all chosen completions, then all rejected ones. For log-probabilities the comparison per token is
    added, which does not favour short completions.
    """
    rows, n = task.rows, len(task.columns[0])
    lengths = torch.tensor([row.n_scored for row in rows]).view(2, n).T  # (N, 2)
    judges, tokens = model.config.head is Head.score, [row.tokens for row in rows]
    scores = reward_scores(model, tokens, **options) if judges else -score(model, rows, **options).nll
    metrics = pair_metrics(scores[:n], scores[n:], lengths)
    if judges:
        return metrics
    means = (scores.view(2, n).T / lengths).unbind(1)
    return {**metrics, "accuracy_per_token": win_rate(means[0] - means[1])}
