"""Evaluation tasks from options: what evaluate.py measures, and what a run measures while it trains.

Errors name options as evaluate.py has them (`data.NAME`); `training/benchmarks.py` renames them. Here are the parts that
lower layers may not know: functions of the user's, judges, and the consent to run programs.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from genai_pl.config.enums import Head
from genai_pl.config.tasks import MATCH_OPTIONS, NAMES, PROGRAM_OPTIONS, GenerationTaskOptions
from genai_pl.errors import ConfigError, DataError
from genai_pl.evaluation import Kind, read_examples
from genai_pl.evaluation.core import NAME as CORE
from genai_pl.evaluation.core import build_core
from genai_pl.evaluation.examples import GENERATIVE_KINDS
from genai_pl.evaluation.generative import (
    ExactMatch,
    ExecutedTests,
    FunctionScore,
    GenerativeRow,
    Limits,
    Scored,
    Scorer,
    build_generative_task,
    check_sandbox,
    describe_protections,
)
from genai_pl.evaluation.tasks import AnyTask, build_task
from genai_pl.models import Model
from genai_pl.training.ai_feedback import Writer, local_writer, preference_for
from genai_pl.training.rewards import Judge, load_function

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


class TaskOptions(NamedTuple):
    """Options of a task.

    path, columns, column, last_word, limit: of `read_examples`. seq_len: tokens of a row at most. stride, bos: of texts.
    generation: how completions are made and scored. execute_code: whether programs may run. device: of a judge.
    """

    path: str
    seq_len: int
    generation: GenerationTaskOptions
    columns: Mapping[str, str] | None = None
    column: str | None = None
    last_word: bool = False
    limit: int | None = None
    stride: int | None = None
    bos: bool | None = None
    execute_code: bool = False
    device: torch.device = torch.device("cpu")

    @property
    def is_core(self) -> bool:
        """Whether the path names the shipped set, and no file."""
        return self.path == CORE and not Path(CORE).exists()

    @property
    def writes(self) -> bool:
        """Whether an option says that the model is to continue prompts, whatever the columns are."""
        return any(
            value is not None for value in (self.generation.score, self.generation.judge, self.generation.extract)
        )


def build_any_task(options: TaskOptions, model: Model, tokenizer: "PreTrainedTokenizerBase") -> tuple[Kind, AnyTask]:
    """The task of these options with the kind of its rows; ConfigError and DataError for what cannot work."""
    options.generation.check()
    judges = model.config.head is Head.score
    if options.is_core:
        _refuse_for_core(options, judges=judges)
        return Kind.choices, build_core(tokenizer, seq_len=options.seq_len, limit=options.limit, bos=options.bos)
    read = {"column": options.column, "last_word": options.last_word, "columns": options.columns}
    if options.writes and (options.column is not None or options.last_word):
        raise ConfigError("data.column and data.last_word are texts to be read; leave them out where the model writes")
    kind, columns = read_examples(options.path, limit=options.limit, **read, writes=options.writes)
    if judges and kind is not Kind.preferences:
        raise ConfigError("a reward model compares; give data.path= with prompt, chosen and rejected")
    if kind not in GENERATIVE_KINDS:
        options.generation.refuse({*NAMES}, "these rows are read, and nothing is written")
        task = build_task(
            options.path,
            kind,
            columns,
            tokenizer,
            seq_len=options.seq_len,
            judges=judges,
            stride=options.stride,
            bos=options.bos,
        )
        return kind, task
    # the model writes
    if options.stride is not None or options.bos is not None:
        name = "stride" if options.stride is not None else "bos"
        raise ConfigError(f"data.{name}={getattr(options, name)}: prompts that are continued have none; leave it out")
    rows = columns[0]
    scorer = choose_scorer(kind, rows, options)
    return kind, build_generative_task(rows, tokenizer, options.generation, scorer, seq_len=options.seq_len)


def _refuse_for_core(options: TaskOptions, *, judges: bool) -> None:
    """ConfigError for options that the shipped set does not have."""
    options.generation.refuse({*NAMES}, f"data.path={CORE} is multiple choice, and nothing is written")
    if judges:
        raise ConfigError(f"data.path={CORE}: for models that predict the next token; a reward model compares")
    for name in ("columns", "column", "last_word", "stride"):
        if value := getattr(options, name):
            raise ConfigError(f"data.{name}={value}: has no effect on data.path={CORE}; leave it out")


def choose_scorer(kind: Kind, rows: Sequence[GenerativeRow], options: TaskOptions) -> Scorer:
    """How completions of these rows are scored; ConfigError and DataError for options that do not fit them."""
    generation = options.generation
    if kind is Kind.tests:
        generation.refuse(MATCH_OPTIONS, "programs are tested")
        return _tests(options)
    generation.refuse(PROGRAM_OPTIONS, "these rows have no tests (columns prompt, test)")
    if generation.score is not None:
        generation.refuse(MATCH_OPTIONS, "data.score is what scores")
        return FunctionScore(load_score(generation.score), f"data.score={generation.score}")
    has_tests = not {"test", "test_list"}.isdisjoint(rows[0].record)
    if has_tests and generation.judge is None:
        generation.refuse(MATCH_OPTIONS, "these rows have tests")
    if missing := next((n for n, row in enumerate(rows, start=1) if not row.answers), None):
        raise DataError(
            f"data.path={options.path}: row {missing} has no column 'answer': add it, or score by data.score=module:function"
        )
    if generation.judge is not None:
        generation.refuse(MATCH_OPTIONS, "data.judge is what scores")
        return WinRate(load_judge(generation.judge, options.device, generation.seed), generation.rubric)
    return ExactMatch(generation.extract, generation.ignore)


def _tests(options: TaskOptions) -> ExecutedTests:
    """The scorer that runs programs; ConfigError without the consent to do so, and where no sandbox is to be had."""
    if not options.execute_code:
        raise ConfigError(
            f"execute_code=false: data.path={options.path} has tests, so programs that the model writes would run on "
            "this machine; read docs/security.md, then set execute_code=true"
        )
    limits = Limits(options.generation.seconds, options.generation.memory_mib)
    protections = describe_protections(check_sandbox(limits))
    log.info("sandbox     %s", protections)
    return ExecutedTests(limits, protections)


def load_score(name: str) -> Callable[..., object]:
    """The function of `data.score`, module:function or file.py:function."""
    module, colon, attribute = name.rpartition(":")
    if not colon or not module or not attribute:
        raise ConfigError(f"data.score={name}: name a function as module:function or file.py:function")
    return load_function(name, module, attribute, option="data.score")


def load_judge(name: str, device: torch.device, seed: int) -> Writer | Judge:
    """The model of `data.judge`, a language model or a reward model."""
    if "://" in name:
        raise ConfigError(f"data.judge={name}: name a model; feedback.py judges by endpoints")
    return local_writer(name, option="judge", device=device, options={"temperature": 0.0}, seed=seed)


class WinRate:
    """1 where a judge prefers the completion to the row's answer, 1/2 where it prefers neither."""

    name, is_share, is_right, more = "win_rate", True, False, ()

    def __init__(self, judge: Writer | Judge, rubric: str) -> None:
        self.judge, self.rubric = judge, rubric
        if rubric and isinstance(judge, Judge):
            raise ConfigError("data.rubric is not read by a reward model; leave it out")

    def __call__(
        self,
        rows: Sequence[GenerativeRow],
        completions: Sequence[Sequence[str]],
        on_done: Callable[[int], object] | None = None,
    ) -> Scored:
        """Compare every completion with the first answer of its row, in both orders."""
        shares: list[list[float]] = []
        for row, of_row in zip(rows, completions, strict=True):
            judge = partial(preference_for, self.judge, row.prompt, second=row.answers[0], rubric=self.rubric)
            shares.append([judge(text) for text in of_row])
            if on_done is not None:
                on_done(len(of_row))
        values = [[(share > 0.5) + (share == 0.5) / 2 for share in of_row] for of_row in shares]
        return Scored(values, [[f"{share:.4f}" for share in of_row] for of_row in shares], {})
