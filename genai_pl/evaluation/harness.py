"""Tasks of lm-evaluation-harness (Gao et al. 2024), run by its own package on a folder that transformers can load.

Its numbers are its own: nothing is reimplemented, so they compare with published ones.
"""

import logging
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path

import torch

from genai_pl.errors import DISK_FULL, ConfigError, DataError
from genai_pl.evaluation.metrics import Metrics

RESAMPLES = 1000  # bootstrap samples, for standard errors that have no formula


def check_harness() -> None:
    """ConfigError where a package that tasks need is missing."""
    missing = [package for package in ("lm_eval", "accelerate") if find_spec(package) is None]
    if missing:
        raise ConfigError(f"tasks needs {', '.join(missing)}: pip install -e '.[eval]'")


def run_tasks(
    folder: Path,
    tasks: Sequence[str],
    *,
    device: torch.device,
    dtype: torch.dtype,
    products: torch.dtype | None,
    batch_size: int,
    seq_len: int | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
) -> Metrics:
    """The metrics of each task, as TASK/METRIC.

    tasks: names of the package's tasks, or paths of YAML files. dtype: of the weights; products: of matrix products, where it
    differs. seq_len: tokens of the context, None for the model's. num_fewshot: solved examples in the prompt. limit: rows of
    each task.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager()
    check_task_names(tasks, manager.all_tasks)
    # transformers' model, as the package wraps it
    model = HFLM(
        str(folder),
        device=str(device),
        dtype=dtype,
        mixed_precision_dtype=products,
        softmax_dtype=torch.float32,
        batch_size=batch_size,
        max_length=seq_len,
    )
    # run all tasks; data sets that cannot be loaded become one line
    options = {"num_fewshot": num_fewshot, "limit": limit, "bootstrap_iters": RESAMPLES, "log_samples": False}
    try:
        results = simple_evaluate(model, tasks=list(tasks), task_manager=manager, **options)
    except OSError as error:
        if error.errno in DISK_FULL:
            raise
        raise DataError(f"tasks={','.join(tasks)}: its data cannot be had ({str(error).splitlines()[0]})") from None
    return flatten_results(results["results"])


def check_task_names(tasks: Sequence[str], known: Sequence[str]) -> None:
    """ConfigError for a name that is neither a task nor a YAML file.

    >>> check_task_names(["arc_esy"], ["arc_easy", "lambada_openai"])
    Traceback (most recent call last):
    genai_pl.errors.ConfigError: tasks=arc_esy: no such task of lm-eval, nor a .yaml file; did you mean arc_easy?
    """
    for task in tasks:
        if task in known or (Path(task).suffix in (".yaml", ".yml") and Path(task).is_file()):
            continue
        matches = get_close_matches(task, known, n=1)
        suggestion = f"; did you mean {matches[0]}?" if matches else ""
        raise ConfigError(f"tasks={task}: no such task of lm-eval, nor a .yaml file{suggestion}")


def flatten_results(results: Mapping[str, Mapping[str, object]]) -> Metrics:
    """Every number of the tasks as TASK/METRIC, or TASK/METRIC/FILTER.

    >>> flatten_results({"arc": {"alias": "arc", "acc,none": 0.5, "acc_stderr,none": 0.1}, "sums": {"exact_match,strict": 0.2}})
    {'arc/acc': 0.5, 'arc/acc_stderr': 0.1, 'sums/exact_match/strict': 0.2}
    """
    metrics = {}
    for task, figures in results.items():
        for key, value in figures.items():
            name, comma, kind = key.partition(",")
            if comma and isinstance(value, int | float):
                metrics[f"{task}/{name}" if kind == "none" else f"{task}/{name}/{kind}"] = float(value)
    return metrics
