"""Benchmarks of a run: the tasks of the group `eval`, read and tokenized before the first step."""

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import TYPE_CHECKING

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from genai_pl.callbacks import Benchmarks
from genai_pl.config.enums import Head, Shape
from genai_pl.config.tasks import NAMES, GenerationTaskOptions
from genai_pl.devices import choose_device
from genai_pl.errors import ConfigError, DataError
from genai_pl.evaluation.labels import is_reward_model
from genai_pl.evaluation.tasks import AnyTask
from genai_pl.models import Model
from genai_pl.models.virtual_tokens import context_of
from genai_pl.training.evaluation_tasks import TaskOptions, build_any_task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TYPES = {
    "path": str,
    "columns": Mapping,
    "column": str,
    "last_word": bool,
    "stride": int,
    "limit": int,
}  # of a task's own


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
    device = torch.device("cpu") if config.trainer.accelerator == "cpu" else choose_device("auto")
    built = {name: _build(name, value, options, model, tokenizer, device) for name, value in tasks.items()}
    return Benchmarks(
        options.every_n_steps,
        built,
        tokenizer=tokenizer,
        batch_tokens=options.batch_tokens,
        say=say,
        spent=spent,
    )


def _build(
    name: str,
    value: object,
    options: DictConfig,
    model: Model,
    tokenizer: "PreTrainedTokenizerBase",
    device: torch.device,
) -> AnyTask:
    """One task: of a path, or of a mapping with a path and options of its own. device: of a judge."""
    task = {"path": value} if isinstance(value, str) else value
    if not isinstance(task, Mapping) or "path" not in task:
        raise ConfigError(f"eval.tasks.{name}={value}: expected a file, or {{path: FILE, column: COLUMN}}")
    if unknown := set(task) - {*TYPES, *NAMES}:
        known = sorted({*TYPES, *NAMES})
        near = get_close_matches(str(min(unknown, key=str)), known, n=1)
        hint = f", did you mean {near[0]}?" if near else ""
        raise ConfigError(
            f"eval.tasks.{name}.{min(unknown, key=str)}: no such option{hint}; there are: {', '.join(known)}"
        )
    _check_types(name, task)
    own = {key: task[key] for key in TYPES if key in task}
    seq_len = context_of(model)
    # errors of evaluate.py name its own options
    try:
        of_task = TaskOptions(
            **{"limit": options.limit} | own,
            seq_len=seq_len,
            generation=_generation_options(name, task),
            execute_code=options.execute_code,
            device=device,
        )
        return build_any_task(of_task, model, tokenizer)[1]
    except (ConfigError, DataError) as error:
        words = str(error).replace("data.", f"eval.tasks.{name}.").replace("execute_code=", "eval.execute_code=")
        raise type(error)(words) from None


def _check_types(name: str, task: Mapping[str, object]) -> None:
    """ConfigError for an option of another type than it must have."""
    for key, kind in TYPES.items():
        value = task.get(key)
        is_flag = isinstance(value, bool) and kind is not bool
        if value is not None and (is_flag or not isinstance(value, kind) or (kind is int and value < 1)):
            words = {str: "text", int: "a whole number of at least 1", bool: "true or false", Mapping: "{name: column}"}
            raise ConfigError(f"eval.tasks.{name}.{key}={value}: expected {words[kind]}")


def _generation_options(name: str, task: Mapping[str, object]) -> GenerationTaskOptions:
    """The options by which completions are made and scored, with the types that they must have."""
    given = {key: task[key] for key in NAMES if key in task}
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(GenerationTaskOptions), given))
    except OmegaConfBaseException as error:
        key = str(getattr(error, "full_key", None) or next(iter(given))).partition("[")[0]
        reason = str(error).splitlines()[0]
        raise ConfigError(f"eval.tasks.{name}.{key}={given.get(key)}: {reason}") from None
