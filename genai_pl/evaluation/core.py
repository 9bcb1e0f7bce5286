"""The core set: small multiple-choice tasks that are shipped, and one figure of them all.

Questions come from `core_questions.py`, the same in every process. Accuracies are centered as in DCLM's CORE (Li et al.
2024, section 3.5): (accuracy - chance) / (1 - chance), 0 for guessing and 1 for all right; the figure is their mean.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from genai_pl.evaluation.choices import Question, choice_metrics, choice_windows
from genai_pl.evaluation.core_questions import TASKS
from genai_pl.evaluation.metrics import Metrics, Z
from genai_pl.evaluation.windows import ScoredWindow

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

NAME = "core"  # what data.path and eval.tasks.NAME call the set
FIGURE = "centered_accuracy"


class CoreTask(NamedTuple):
    """Questions of each task of the set, and the windows of all their choices in order."""

    questions: dict[str, list[Question]]
    rows: list[ScoredWindow]

    @property
    def counts(self) -> dict[str, int]:
        """Questions, scored tokens, and prompts that were cut."""
        scored, cut = sum(row.n_scored for row in self.rows), sum(row.truncated for row in self.rows)
        return {"rows": sum(map(len, self.questions.values())), "tokens": scored, "cut": cut}

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Names of its metrics."""
        return (FIGURE, f"{FIGURE}_low", f"{FIGURE}_high", *self.questions)


def build_core(tokenizer: "PreTrainedTokenizerBase", *, seq_len: int, limit: int | None, bos: bool | None) -> CoreTask:
    """The set, tokenized. limit: questions of each task."""
    questions = {name: make()[:limit] for name, make in TASKS.items()}
    every = [question for of_task in questions.values() for question in of_task]
    return CoreTask(questions, choice_windows(every, tokenizer, seq_len=seq_len, bos=bos))


def core_metrics(nll: "Tensor", questions: Mapping[str, Sequence[Question]]) -> Metrics:
    """The mean centered accuracy with its 95 % interval, and the centered accuracy of each task.

    nll: losses of all choices in order. The interval is normal: the variance of each task's accuracy is that of a
    share to which two right and two wrong answers are added (Agresti and Coull 1998), since 0 and 1 have none.
    """
    metrics: Metrics = {}
    variance, first = 0.0, 0
    for name, of_task in questions.items():
        n_choices, n = sum(len(question.choices) for question in of_task), len(of_task)
        found = choice_metrics(nll[first : first + n_choices], of_task)
        first += n_choices
        metrics[name] = (found["accuracy"] - found["chance"]) / (1 - found["chance"])
        share = (found["accuracy"] * n + 2) / (n + 4)
        variance += share * (1 - share) / (n + 4) / (1 - found["chance"]) ** 2
    mean, width = sum(metrics.values()) / len(questions), Z * math.sqrt(variance) / len(questions)
    return {FIGURE: mean, f"{FIGURE}_low": mean - width, f"{FIGURE}_high": mean + width, **metrics}
