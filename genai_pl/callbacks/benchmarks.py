"""Benchmarks: tasks that a model is measured on while it trains, by the machinery of evaluate.py.

The first process measures, on the whole model; the others wait for it. Completions are drawn by generators of their own,
so training is the same with and without benchmarks. They come before the checkpoint of their step, which holds them.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import lightning as L

from genai_pl.callbacks.best import MetricWatch
from genai_pl.callbacks.due import PeriodicCallback
from genai_pl.config.metric_modes import headline
from genai_pl.evaluation.tasks import AnyTask, measure
from genai_pl.generation.decode import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Benchmarks(PeriodicCallback):
    """Measures tasks every n optimizer steps, and at the last step.

    every_n_steps: optimizer steps between measurements
    tasks: name to task; its metrics are logged as `eval/NAME/METRIC`
    tokenizer: of the model
    batch_tokens: tokens of a batch, padding included
    say: where to print
    spent: told the seconds of each measurement

    watches: the best checkpoint and early stopping, where they are of these metrics; set from outside
    metrics: those of the last measurement. seconds: that measuring has taken in this process
    """

    def __init__(
        self,
        every_n_steps: int,
        tasks: Mapping[str, AnyTask],
        *,
        tokenizer: "PreTrainedTokenizerBase",
        batch_tokens: int,
        say: Callable[[str], None] = print,
        spent: Callable[[float], None] | None = None,
    ) -> None:
        super().__init__(every_n_steps, spent)
        self.tasks, self.batch_tokens, self.tokenizer, self.say = tasks, batch_tokens, tokenizer, say
        self.watches: Sequence[MetricWatch] = ()
        self.metrics: dict[str, float] = {}

    @property
    def metric_names(self) -> dict[str, tuple[str, ...]]:
        """Names of the metrics of each task, the one by which it is known first."""
        names = {name: task.metric_names for name, task in self.tasks.items()}
        return {name: tuple(sorted(of_task, key=headline(of_task).__ne__)) for name, of_task in names.items()}

    def state_dict(self) -> dict[str, object]:
        return {"metrics": self.metrics}

    def load_state_dict(self, state: dict[str, object]) -> None:
        self.metrics = {name: float(value) for name, value in state["metrics"].items()}

    def act(self, trainer: L.Trainer, module: L.LightningModule, step: int) -> None:
        """Measure all tasks. All ranks enter the gather of sharded weights."""
        with module.unsharded_model(), trainer.precision_plugin.forward_context(), evaluating(module.model):
            if trainer.is_global_zero:
                self._measure(trainer, module, step)
        if self.watches:  # all ranks stop, and keep checkpoints, by the same numbers
            self.metrics = trainer.strategy.broadcast(self.metrics)
        for watch in self.watches:
            watch.remember(trainer, self.metrics)

    def _measure(self, trainer: L.Trainer, module: L.LightningModule, step: int) -> None:
        """Measure all tasks, log their metrics and print one line."""
        headlines = []
        self.metrics = {}
        for name, task in self.tasks.items():
            found = measure(task, module.model, self.tokenizer, batch_tokens=self.batch_tokens)
            self.metrics |= {f"eval/{name}/{metric}": value for metric, value in found.items()}
            best = headline(found)
            text = f"eval/{name}/{best} {found[best]:.4f}"
            if f"{best}_low" in found:
                text += f" ({found[f'{best}_low']:.3f} to {found[f'{best}_high']:.3f})"
            headlines.append(text)
        for logger in trainer.loggers:
            logger.log_metrics(self.metrics, step=step)
        self.say(f"{step:8d}  {'  '.join(headlines)}")
