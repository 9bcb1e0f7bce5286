"""The evaluate command: a resolved configuration in, a table of metrics on stdout out."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from genai_pl.data import sources, token_bytes
from genai_pl.devices import DTYPES, choose_device
from genai_pl.errors import DISK_FULL, ConfigError, DataError
from genai_pl.evaluation import (
    Row,
    completion_metrics,
    completion_rows,
    judge,
    pair_metrics,
    pair_rows,
    score,
    share,
    text_metrics,
    text_rows,
)
from genai_pl.files import write_atomic
from genai_pl.loading import Loaded, load
from genai_pl.names import Head

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

PAIR = ("prompt", "completion")
PREFERENCE = ("prompt", "chosen", "rejected")


def evaluate(config: DictConfig) -> int:
    """Print what the model's predictions are worth, and write it to `out` if that is given."""
    check(config)
    torch.set_float32_matmul_precision(config.precision.matmul)
    device = choose_device(config.device)
    table = read(config.data.path, config.data.column)
    if config.limit is not None:
        table = table.select(range(min(config.limit, len(table))))
    compared = set(PREFERENCE) <= set(table.column_names)
    loaded = load_model(config, judges=compared)
    model = loaded.model.to(device)
    rows = build_rows(config.data, table, loaded.tokenizer, model.config.max_seq_len)
    products = DTYPES[config.precision.lightning][1]
    with (
        tqdm(total=len(rows), desc="evaluating", disable=None, leave=False) as bar,  # None: only on a terminal
        torch.autocast(device.type, dtype=products, enabled=products is not None),
    ):
        measure = compare if compared else predict
        metrics = measure(loaded, table, rows, batch_tokens=config.batch_tokens, on_batch=bar.update)
    counts = {"rows": len(table), "tokens": sum(row.n_scored for row in rows), "cut": sum(row.cut for row in rows)}
    report(metrics, counts, config.data, model.config.max_seq_len)
    if config.out:
        write(config, {**metrics, **counts})
    return 0


def check(config: DictConfig) -> None:
    """ConfigError for values that cannot work, before anything is read."""
    for name, value in (
        ("limit", config.limit),
        ("batch_tokens", config.batch_tokens),
        ("data.seq_len", config.data.seq_len),
        ("data.stride", config.data.stride),
    ):
        if value is not None and value < 1:
            raise ConfigError(f"{name}={value} must be at least 1")
    if config.out and Path(config.out).is_dir():
        raise ConfigError(f"out={config.out}: a folder; give the name of a .json file")


def predict(loaded: Loaded, table: "Dataset", rows: list[Row], **scoring: object) -> dict[str, float]:
    """What the model's predictions of texts or completions are worth."""
    scores = score(loaded.model, rows, **scoring)
    measure = completion_metrics if is_paired(table) else text_metrics
    return measure(scores, rows, token_bytes(loaded.tokenizer, loaded.model.config.vocab_size))


def compare(loaded: Loaded, table: "Dataset", rows: list[Row], **scoring: object) -> dict[str, float]:
    """How often the chosen completion gets more: the score of a reward model, or else the log-probability."""
    n = len(rows) // 2  # the chosen ones, then the rejected ones
    lengths = torch.tensor([row.n_scored for row in rows]).view(2, n).T  # (N, 2)
    judges, tokens = loaded.model.config.head is Head.score, [row.tokens for row in rows]
    found = judge(loaded.model, tokens, **scoring) if judges else -score(loaded.model, rows, **scoring).nll
    metrics = pair_metrics(found[:n], found[n:], lengths)
    if judges:
        return metrics
    means = (found.view(2, n).T / lengths).unbind(1)
    return {**metrics, "accuracy_per_token": share(means[0] - means[1])}


def load_model(config: DictConfig, *, judges: bool) -> Loaded:
    """The model and its tokenizer; ConfigError if it neither predicts the next token nor, with `judges`, scores texts."""
    loaded = load(config.checkpoint, dtype=DTYPES[config.precision.lightning][0])
    found = loaded.model.config
    if found.head is Head.score and not judges:
        raise ConfigError(
            f"checkpoint={config.checkpoint}: a reward model compares; give data.path= with prompt, chosen and rejected"
        )
    if found.head is not Head.score and found.shape.value != "decoder":
        raise ConfigError(
            f"checkpoint={config.checkpoint}: evaluate needs a model of shape decoder, not {found.shape.value}"
        )
    return loaded


def read(path: str, column: str | None) -> "Dataset":
    """The rows of the data with their column `text`, or `prompt` and `completion`, or `prompt`, `chosen` and `rejected`."""
    source = sources.shipped_validation(path) or sources.find(path)
    table = sources.read_table(source)
    found = set(table.column_names)
    for columns in (PREFERENCE, PAIR):
        if column is None and set(columns) <= found:
            return table.select_columns(columns)
    if column is None and "text" not in found:
        names = ", ".join(table.column_names)
        raise DataError(
            f"data.path={path}: no column 'text', nor 'prompt' and 'completion'; found: {names} (set data.column)"
        )
    name = column or "text"
    sources.check_columns(source, table, {"data.column": name})
    table = table.select_columns([name])
    return table if name == "text" else table.rename_column(name, "text")


def is_paired(table: "Dataset") -> bool:
    """Whether the rows are prompts and completions."""
    return set(PAIR) <= set(table.column_names)


def build_rows(
    options: DictConfig, table: "Dataset", tokenizer: "PreTrainedTokenizerBase", max_seq_len: int
) -> list[Row]:
    """What the model reads and what of it is scored."""
    seq_len = options.seq_len or max_seq_len
    compared = set(PREFERENCE) <= set(table.column_names)
    if not (is_paired(table) or compared):
        rows = text_rows(table["text"][:], tokenizer, seq_len=seq_len, stride=options.stride, bos=options.bos)
    elif options.stride is not None:
        raise ConfigError(f"data.stride={options.stride}: prompts and completions have no windows; leave it out")
    else:
        prompts, *said = ([*table[name]] for name in (PREFERENCE if compared else PAIR))
        try:
            if compared:
                rows = pair_rows(prompts * 2, said[0] + said[1], tokenizer, seq_len=seq_len)
            else:
                rows = completion_rows(prompts, *said, tokenizer, seq_len=seq_len, bos=options.bos)
        except DataError as error:
            raise DataError(f"data.path={options.path}: {error}") from None
    if not rows:
        raise DataError(f"data.path={options.path}: there is no token to score; a text needs two, or data.bos=true")
    return rows


def report(metrics: dict[str, float], counts: dict[str, int], options: DictConfig, max_seq_len: int) -> None:
    """Print a name and a value a line."""
    for name, value in metrics.items():
        print(f"{name:<22}{value:>12.4f}")
    print(f"{'n':<22}{counts['rows']:>12,} rows, {counts['tokens']:,} tokens")
    if counts["cut"]:
        context = options.seq_len or max_seq_len
        print(f"{'cut':<22}{counts['cut']:>12,} prompts, on the left, to the context of {context} tokens")


def write(config: DictConfig, figures: dict[str, float]) -> None:
    """Write the figures and what they are of; one that is not finite becomes null, as JSON has no other."""
    finite = {name: value if math.isfinite(value) else None for name, value in figures.items()}
    text = json.dumps({**finite, "config": OmegaConf.to_container(config)}, indent=2) + "\n"
    try:
        write_atomic(Path(config.out), lambda path: path.write_text(text, encoding="utf-8"))
    except OSError as error:
        if error.errno in DISK_FULL:
            raise
        raise ConfigError(f"out={config.out}: cannot be written ({error.strerror})") from None
