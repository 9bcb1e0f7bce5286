"""Runs of train.py in processes of their own, and comparisons of two of them."""

import csv
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.conftest import ROOT
from tests.preloaded import Command

SMALL = (
    "model.n_layer=2",
    "model.n_embd=32",
    "model.max_seq_len=32",
    "tokenizer=byte",
    "data.path=documents.jsonl",
    "optimizer=sgd",
    "optimizer.lr=0.3",
    "scheduler=constant",
    "scheduler.warmup_steps=0",
    "trainer.max_steps=4",
    "trainer.limit_val_batches=2",
    "trainer.log_every_n_steps=1",
    "callbacks.samples.every_n_steps=null",
    "logger=csv",
)
HALF, WHOLE = "data.batch_size=2", "data.batch_size=4"  # rows per process that sees batches of its own, or all
MODEL = "model/model.safetensors"  # what a run exports
SAME = ("train/loss", "train/grad_norm", "val/loss", "val/accuracy")


def write_documents(folder: Path) -> None:
    """Short documents of very different lengths: rows of them predict different numbers of tokens."""
    words, draw = ["to", "be", "or", "not", "that", "is", "the", "question"], random.Random(0)
    texts = [" ".join(draw.choices(words, k=draw.choice((1, 2, 40)))) for _ in range(400)]
    (folder / "documents.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def start(folder: Path, *arguments: str, launch: tuple[str, ...] = ()) -> Command | subprocess.Popen:
    """train.py with the arguments, in the folder; launch: what Python is to run with train.py as its argument."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if not launch:
        devices = (argument.partition("=")[2] for argument in arguments if argument.startswith("trainer.devices="))
        return Command(arguments, folder, environment, int(next(devices, 2)) - 1)
    command = [sys.executable, *launch, str(ROOT / "train.py"), *arguments]
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def train(folder: Path, *arguments: str, launch: tuple[str, ...] = ()) -> str:
    """What train.py prints."""
    process = start(folder, *arguments, launch=launch)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    return out


def table(run: Path) -> dict[int, dict[str, str]]:
    """The logged metrics by step."""
    with (run / "metrics.csv").open() as file:
        return {int(row["step"]): row for row in csv.DictReader(file)}


def assert_same(
    run: Path, reference: Path, names: tuple[str, ...] = SAME, *, exported: str = MODEL, rounding: float = 0.0
) -> None:
    """Losses, norms of gradients and exported weights agree to 1e-5; `rounding` is what may lie between numbers near 0."""
    expected, actual = table(reference), table(run)
    assert actual.keys() == expected.keys()
    for step, row in expected.items():
        for name in names:
            a, b = float(actual[step][name] or 0), float(row[name] or 0)
            assert abs(a - b) <= 1e-5 * abs(b) + rounding, (step, name, a, b)
    weights, others = (load_file(folder / exported) for folder in (run, reference))
    assert weights.keys() == others.keys()
    for name, value in others.items():
        assert (weights[name] - value).abs().max() <= 1e-5, name


def assert_equal_to_the_last_bit(
    run: Path,
    expected: Path,
    exported: str = MODEL,
    names: tuple[str, ...] = ("train/loss", "train/grad_norm", "val/loss"),
) -> None:
    """Metrics and exported weights are the same numbers."""
    actual, right = table(run), table(expected)
    assert actual.keys() == right.keys()
    for step, row in right.items():
        for name in names:
            assert actual[step][name] == row[name], (step, name)
    weights, others = (load_file(path / exported) for path in (run, expected))
    for name, value in others.items():
        assert torch.equal(weights[name], value), name


def wait_for_step(process: Command, run: Path, step: int) -> None:
    """Return when the run has logged the step."""
    deadline = time.monotonic() + 300
    while not (run / "metrics.csv").exists() or max(table(run), default=0) < step:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def processes(first: Command) -> list[int]:
    """The ids of a run's processes, by rank."""
    return [first.pid, *map(int, subprocess.check_output(["pgrep", "-P", str(first.pid)]).split())]
