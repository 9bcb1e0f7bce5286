"""The evaluate command: a resolved configuration in, a table of metrics on stdout out.

Two sources of tasks. `data.path` names a file whose columns decide what is measured: perplexity of texts,
likelihood of completions or of assistant turns, accuracy of choices, preference of pairs, or what the model writes.
`tasks=` names tasks of lm-evaluation-harness, which runs on an exported folder. `out=` writes the figures with the
configuration that they are of, `completions=` what the model wrote.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf

from genai_pl.atomic_io import write_atomic
from genai_pl.cli.evaluate_labels import evaluate_labels, print_metrics
from genai_pl.cli.evaluate_steps import evaluate_steps
from genai_pl.config.enums import Head
from genai_pl.config.tasks import NAMES, GenerationTaskOptions
from genai_pl.devices import choose_device, dtypes_of, weights_of
from genai_pl.errors import DISK_FULL, ConfigError
from genai_pl.evaluation import Kind
from genai_pl.evaluation.generative import ExecutedTests, GenerativeTask
from genai_pl.evaluation.harness import check_harness, run_tasks
from genai_pl.evaluation.labels import is_reward_model
from genai_pl.evaluation.steps import step_separator
from genai_pl.evaluation.tasks import measure, n_rows
from genai_pl.exporting import export_model
from genai_pl.loading import Loaded, load
from genai_pl.models import move_to
from genai_pl.models.virtual_tokens import context_of
from genai_pl.peft import adapters_of, merge
from genai_pl.progress import progress_bar
from genai_pl.training.evaluation_tasks import TaskOptions, build_any_task
from genai_pl.training.hydra_job import job_overrides
from genai_pl.training.unused_options import EVALUATE_RULES, NO_BOS_RULE, NO_LABELS_RULE, refuse_unused

CONFIG_KEYS = {"checkpoint", "tasks", "num_fewshot", "batch_tokens", "out"}  # options that stand beside figures
MANY = 64  # tokens of a typical pass: whole texts


def evaluate(config: DictConfig) -> int:
    """Print the metrics of the model, and write them to `out` if that is given; the exit status."""
    check_options(config)
    dtypes_of(config.precision.lightning)  # refuses what is for training only
    matmul = config.precision.matmul
    torch.set_float32_matmul_precision("highest" if matmul == "auto" else matmul)
    figures = evaluate_data(config) if config.tasks is None else evaluate_tasks(config)
    if config.out:
        write_figures(config, figures)
    return 0


def check_options(config: DictConfig) -> None:
    """ConfigError for values that cannot work, before anything is read."""
    for name, value in (
        ("limit", config.limit),
        ("batch_tokens", config.batch_tokens),
        ("batch_size", config.batch_size),
        ("data.seq_len", config.data.seq_len),
        ("data.stride", config.data.stride),
    ):
        if value is not None and value < 1:
            raise ConfigError(f"{name}={value} must be at least 1")
    if config.num_fewshot is not None and (config.tasks is None or config.num_fewshot < 0):
        raise ConfigError(f"num_fewshot={config.num_fewshot} is for tasks=, and not below 0")
    if config.tasks is not None and config.dtype is not None:
        raise ConfigError(f"dtype={config.dtype} is for data.path=: transformers runs tasks=; leave one of them out")
    if config.tasks is not None and not config.tasks:
        raise ConfigError("tasks= names none: give [lambada_openai,arc_easy], or null to measure on data.path")
    if config.out:
        check_out(config)
    if config.completions and os.path.lexists(config.completions):
        raise ConfigError(f"completions={config.completions}: exists already; name a new file")
    refuse_unused(config, job_overrides(), EVALUATE_RULES)


def check_out(config: DictConfig) -> None:
    """ConfigError for an `out` that is a folder, or an existing file that this command has not written: data would
    be lost.
    """
    out, data = Path(config.out), Path(config.data.path)
    if out.is_dir():
        raise ConfigError(f"out={config.out}: a folder; give the name of a .json file")
    if os.path.lexists(out) and (not _is_figures_file(out) or (data.exists() and out.samefile(data))):
        raise ConfigError(f"out={config.out}: exists already, and is no table of evaluate.py; name a new file")


def _is_figures_file(path: Path) -> bool:
    """True if a file is JSON of `write_figures`: figures with the configuration that they are of."""
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
        return isinstance(contents, dict) and set(contents["config"]) >= CONFIG_KEYS
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return False


def evaluate_data(config: DictConfig) -> dict[str, float]:
    """Metrics of the model on the rows of `data`, printed, with the counts of rows, scored tokens and cut prompts."""
    options = config.data
    device = choose_device(config.device)
    loaded = load_checkpoint(config)
    if (separator := step_separator(loaded.model)) is not None:
        return evaluate_steps(config, loaded, separator)
    if loaded.model.config.head.scores and not is_reward_model(loaded.model):
        return evaluate_labels(config, loaded)
    refuse_unused(config, job_overrides(), [NO_LABELS_RULE])
    check_model(config, loaded, judges=True)
    # tokenize everything first: mistakes in the data show before any model runs
    kind, task = build_any_task(task_options(config, loaded, device), loaded.model, loaded.tokenizer)
    if kind in (Kind.preferences, Kind.conversations):
        refuse_unused(config, job_overrides(), [NO_BOS_RULE])
    if config.completions and not isinstance(task, GenerativeTask):
        raise ConfigError(f"completions={config.completions}: data.path={options.path} is read, and nothing is written")
    weights, products = weights_of(config.precision.lightning, config.dtype, device)
    model = move_to(loaded.model, device, products or weights)
    written: list[dict[str, object]] = []
    with (
        progress_bar(n_rows(task), "evaluating", leave=False) as bar,
        torch.autocast(device.type, dtype=products, enabled=products is not None),
    ):
        # score in batches of about batch_tokens tokens
        options = {"batch_tokens": config.batch_tokens, "on_batch": bar.update, "keep": written.append}
        metrics = measure(task, model, loaded.tokenizer, **options)
    if config.completions:
        write_completions(config, written)
    counts = task.counts
    print_metrics(metrics)
    print(f"{'n':<22}{counts['rows']:>12,} rows, {counts['tokens']:,} tokens")
    if isinstance(task, GenerativeTask) and isinstance(task.scorer, ExecutedTests):
        print(f"{'sandbox':<22}{task.scorer.protections}")
    if counts["cut"]:
        context = config.data.seq_len or context_of(model)
        print(f"{'cut':<22}{counts['cut']:>12,} prompts, on the left, to the context of {context} tokens")
    return {**metrics, **counts}


def evaluate_tasks(config: DictConfig) -> dict[str, float]:
    """Metrics of the model on tasks of lm-evaluation-harness, printed."""
    check_harness()
    tasks = config.tasks if isinstance(config.tasks, ListConfig) else [config.tasks]
    dtype, products = dtypes_of(config.precision.lightning)
    device = choose_device(config.device)
    # the harness loads a folder by its path: export one if there is none
    with TemporaryDirectory() as temporary:
        metrics = run_tasks(
            transformers_folder(config, Path(temporary) / "model"),
            [str(task) for task in tasks],
            device=device,
            dtype=dtype,
            products=products,
            batch_size=config.batch_size,
            seq_len=config.data.seq_len,
            num_fewshot=config.num_fewshot,
            limit=config.limit,
        )
    print_metrics(metrics)
    return metrics


def transformers_folder(config: DictConfig, temporary: Path) -> Path:
    """A folder of the checkpoint that transformers can load; written to `temporary`, adapters merged, if there is
    none.
    """
    loaded = load_checkpoint(config)
    check_model(config, loaded, judges=False)
    model, tokenizer, path = loaded
    if (path / "config.json").is_file():
        return path
    export_model(merge(model) if adapters_of(model) else model, tokenizer, temporary, card={})
    return temporary


def load_checkpoint(config: DictConfig) -> Loaded:
    """The model and its tokenizer, with weights in the dtype of `precision` and `dtype`."""
    weights, _ = weights_of(config.precision.lightning, config.dtype, choose_device(config.device))
    return load(config.checkpoint, dtype=weights, rows=MANY)


def check_model(config: DictConfig, loaded: Loaded, *, judges: bool) -> None:
    """ConfigError unless the model is a decoder that predicts the next token, or with `judges` a reward model, and
    its context holds data.seq_len tokens.
    """
    model_config = loaded.model.config
    if model_config.head is Head.score and not judges:
        raise ConfigError(
            f"checkpoint={config.checkpoint}: a reward model compares; give data.path= with prompt, chosen and rejected"
        )
    context = context_of(loaded.model)
    if (config.data.seq_len or 0) > context:
        raise ConfigError(
            f"data.seq_len={config.data.seq_len}: more than the model's context of {context} tokens; lower it"
        )
    if model_config.head is not Head.score and model_config.shape.value != "decoder":
        raise ConfigError(
            f"checkpoint={config.checkpoint}: evaluate needs a model of shape decoder, not {model_config.shape.value}"
        )


def task_options(config: DictConfig, loaded: Loaded, device: torch.device) -> TaskOptions:
    """The options of the task that `data` names. device: of a judge."""
    options = config.data
    return TaskOptions(
        path=options.path,
        seq_len=options.seq_len or context_of(loaded.model),
        generation=GenerationTaskOptions(**{name: _plain(options[name]) for name in NAMES}),
        columns=dict(options.columns),
        column=options.column,
        last_word=options.last_word,
        limit=config.limit,
        stride=options.stride,
        bos=options.bos,
        execute_code=config.execute_code,
        device=device,
    )


def _plain(value: object) -> object:
    """The value of an option without OmegaConf's types."""
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def write_completions(config: DictConfig, rows: Sequence[Mapping[str, object]]) -> None:
    """Write what the model wrote as JSON lines, atomically."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    _write(config.completions, lines, option="completions")


def write_figures(config: DictConfig, figures: dict[str, float]) -> None:
    """Write metrics and configuration as JSON, atomically; NaN and infinity, which JSON has not, become null."""
    finite = {name: value if math.isfinite(value) else None for name, value in figures.items()}
    text = json.dumps({**finite, "config": OmegaConf.to_container(config)}, indent=2) + "\n"
    _write(config.out, text, option="out")


def _write(name: str, text: str, *, option: str) -> None:
    """Write a text file, atomically; ConfigError names the option where the system refuses."""
    try:
        write_atomic(Path(name), lambda path: path.write_text(text, encoding="utf-8"))
    except OSError as error:
        if error.errno in DISK_FULL:
            raise
        raise ConfigError(f"{option}={name}: cannot be written ({error.strerror})") from None
