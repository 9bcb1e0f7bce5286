"""Benchmarks of a run: the tasks of the group `eval`, read and tokenized before the first step."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf

from genai_pl.callbacks import Benchmarks
from genai_pl.config.enums import Head, Shape
from genai_pl.errors import ConfigError, DataError
from genai_pl.evaluation import read_examples
from genai_pl.evaluation.labels import is_reward_model
from genai_pl.evaluation.tasks import Task, build_task
from genai_pl.models import Model
from genai_pl.models.virtual_tokens import n_virtual

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FIELDS = {"path", "column", "last_word", "stride", "limit"}  # of a task


def build_benchmarks(
    config: DictConfig,
    model: Model,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    gathers: bool,
    say: Callable[[str], None],
    spent: Callable[[float], None],
) -> Benchmarks | None:
    """The callback that measures the tasks of a run, None without any; ConfigError and DataError for what cannot work.

    gathers: whether a process can hold the whole model. say: where to print. spent: told the seconds of each measurement.
    """
    options = config.eval
    tasks = OmegaConf.to_container(options.tasks, resolve=True)
    if options.every_n_steps is None and not tasks:
        return None
    if options.every_n_steps is None or not tasks:
        name = "eval.tasks={}" if not tasks else "eval.every_n_steps=null"
        raise ConfigError(f"{name}: give both, eval.every_n_steps=100 and eval.tasks.NAME=FILE")
    if not gathers:
        raise ConfigError(
            "eval.tasks: no process holds the whole model under this strategy; evaluate.py measures checkpoints"
        )
    if model.config.shape is not Shape.decoder or (model.config.head is Head.score and not is_reward_model(model)):
        raise ConfigError("eval.tasks: for decoders that predict the next token, and reward models")
    built = {name: _build(name, value, options, model, tokenizer) for name, value in tasks.items()}
    return Benchmarks(
        options.every_n_steps, built, tokenizer=tokenizer, batch_tokens=options.batch_tokens, say=say, spent=spent
    )


def _build(name: str, value: object, options: DictConfig, model: Model, tokenizer: "PreTrainedTokenizerBase") -> Task:
    """One task: of a path, or of a mapping with a path and options of its own."""
    task = {"path": value} if isinstance(value, str) else value
    if not isinstance(task, Mapping) or "path" not in task:
        raise ConfigError(f"eval.tasks.{name}={value}: expected a file, or {{path: FILE, column: COLUMN}}")
    if unknown := set(task) - FIELDS:
        raise ConfigError(f"eval.tasks.{name}.{min(unknown)}: no such option; there are: {', '.join(sorted(FIELDS))}")
    # errors of evaluate.py name its own option
    try:
        columns = {"column": task.get("column"), "last_word": bool(task.get("last_word", False))}
        kind, data = read_examples(task["path"], **columns, limit=task.get("limit", options.limit))
        judges, seq_len = model.config.head is Head.score, model.config.max_seq_len - n_virtual(model)
        if judges and kind.name != "preferences":
            raise ConfigError(f"eval.tasks.{name}: a reward model compares; give rows with prompt, chosen and rejected")
        stride = task.get("stride")
        return build_task(task["path"], kind, data, tokenizer, seq_len=seq_len, judges=judges, stride=stride)
    except (ConfigError, DataError) as error:
        raise type(error)(str(error).replace("data.", f"eval.tasks.{name}.")) from None
