"""Evaluation of process reward models: how often the score of a step is on the side of its label, and first errors found."""

import json

from omegaconf import DictConfig
from tqdm import tqdm

from genai_pl.cli.evaluate_labels import max_length, print_metrics
from genai_pl.data import sources
from genai_pl.data.formats import TOOLS
from genai_pl.data.stepwise import StepwiseDataModule
from genai_pl.devices import choose_device
from genai_pl.evaluation.steps import step_metrics, step_scores
from genai_pl.loading import Loaded
from genai_pl.training.hydra_job import job_overrides
from genai_pl.training.unused_options import NO_BOS_RULE, NO_LABELS_RULE, refuse_unused


def evaluate_steps(config: DictConfig, loaded: Loaded, separator: str) -> dict[str, float]:
    """Metrics of a process reward model on rows with prompt, completions (steps) and labels, printed, with the counts."""
    refuse_unused(config, job_overrides(), [NO_BOS_RULE, NO_LABELS_RULE])
    options, limit = config.data, max_length(config.data, loaded)
    columns = {name: name for name in ("prompt", "completions", "labels")}
    loading = {"seq_len": limit, "batch_size": 1, "val_batch_size": None, "workers": 0, "shuffle": False, "seed": 0}
    source = sources.find_source(options.path, columns=dict(options.columns))
    data = StepwiseDataModule(
        **{**columns, **loading, "path": options.path, "val_path": None, "val_fraction": 0.5},
        columns=dict(options.columns),
        step_separator=separator,
        train_on_last_step_only=False,
    )
    table = data.read_table(source)
    table = table.select(range(min(len(table), config.limit or len(table))))
    prompts, steps, labels, tools = (
        [json.loads(cell) for cell in table[name]] for name in ("prompt", "completions", "labels", TOOLS)
    )
    with tqdm(total=len(prompts), desc="evaluating", disable=None, leave=False) as bar:  # None: only on a terminal
        scores = step_scores(
            *(loaded.model.to(choose_device(config.device)), loaded.tokenizer, prompts, steps),
            separator=separator,
            max_length=limit,
            batch_tokens=config.batch_tokens,
            tools=tools,
            on_batch=bar.update,
        )
    metrics = step_metrics(scores, labels)
    print_metrics(metrics)
    print(f"{'n':<22}{len(prompts):>12,} answers, {sum(map(len, steps)):,} steps")
    return {**metrics, "answers": len(prompts), "steps": sum(map(len, steps))}
