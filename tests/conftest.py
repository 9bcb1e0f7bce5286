"""Fixtures of all tests: one thread, no network, no wait for the disk, a cache of their own, and commands as a user runs them."""

import importlib
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

import pytest
import torch

os.fsync = lambda descriptor: None  # no test loses power, and a run waits for the disk some 25 times
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton, whose own functions it changes

ROOT = Path(__file__).parent.parent
TINY = (
    "model.n_layer=1",
    "model.n_embd=32",
    "model.max_seq_len=32",
    "tokenizer=byte",
    "data.batch_size=4",
    "trainer.max_steps=4",
    "trainer.limit_val_batches=2",
    "trainer.log_every_n_steps=1",
    "callbacks.samples.every_n_steps=null",
)


def some(cases: Iterable[object]) -> list[object]:
    """All cases of a parametrization, every second one marked as slow: what they check has cases enough in each half."""
    pairs = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [pytest.param(*pair, marks=[pytest.mark.slow] if n % 2 else []) for n, pair in enumerate(pairs)]


class Result(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    import datasets

    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")


@pytest.fixture(autouse=True)
def _own_modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Forget modules that a test wrote and imported, since the next test may use the same name."""
    before, base = set(sys.modules), str(tmp_path_factory.getbasetemp())
    yield
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(base):
            del sys.modules[name]


def close_logs() -> None:
    """Close the log files that Hydra opened for a run, which the next logging configuration would leave open."""
    for handler in list(logging.root.handlers):
        if isinstance(handler, logging.FileHandler) and handler.baseFilename.endswith(".log"):
            logging.root.removeHandler(handler)
            handler.close()
        elif isinstance(handler, logging.StreamHandler) and getattr(handler.stream, "closed", False):
            logging.root.removeHandler(handler)  # of a test before this one, whose output is no longer taken


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., Result]:
    """`command("train", *arguments)` runs train.py in an empty folder: exit status, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))

    def call(name: str, *arguments: str) -> Result:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        close_logs()
        status = 0
        capfd.readouterr()
        try:
            importlib.import_module(name).main()
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
        finally:
            close_logs()
        return Result(status, *capfd.readouterr())

    return call
