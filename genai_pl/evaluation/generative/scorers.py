"""Scorers of completions: exact match, a function of the user's, and tests that are run.

A scorer gives each completion of each row a number, and a word on it. Numbers become means over rows with a 95 %
interval, and for several samples pass@k.
"""

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

from genai_pl.errors import ConfigError
from genai_pl.evaluation.generative.rows import GenerativeRow
from genai_pl.evaluation.generative.sandbox import PASSED, REASONS, Limits, run_programs
from genai_pl.evaluation.metrics import Metrics, mean_interval, pass_at_k, with_interval

ARTICLES = re.compile(r"\b(?:a|an|the)\b", re.IGNORECASE)
FENCED = re.compile(r"```(?:python|py|Python)?[ \t]*\n(.*?)(?:\n```|$)", re.DOTALL)
OnDone = Callable[[int], object]
UserScore = Callable[[str, Mapping[str, object]], float]


class Scored(NamedTuple):
    """Numbers of N rows with n completions each, and a word on each; more: further metrics."""

    values: list[list[float]]
    notes: list[list[str]]
    more: Metrics


class Scorer(Protocol):
    """Interface of scorers.

    name: of the mean. is_share: whether numbers are from 0 to 1. is_right: whether they are 1 for right and 0 for wrong, so
    that pass@k exists. more: names of further metrics. Called with the rows, the completions of each, and what is told
    how many more completions are scored.
    """

    name: str
    is_share: bool
    is_right: bool
    more: tuple[str, ...]

    def __call__(
        self, rows: Sequence[GenerativeRow], completions: Sequence[Sequence[str]], on_done: OnDone | None = None
    ) -> Scored: ...


class ExactMatch:
    """1 where a completion is one of the right answers, after both are normalized.

    extract: regular expression whose last match in a completion is its answer, by its group if it has one; a completion
    without a match is wrong. A right answer is the last match in its cell, or the cell where there is none.
    ignore: what does not count, of `config.tasks.IGNORABLE`.
    """

    name, is_share, is_right = "exact_match", True, True

    def __init__(self, extract: str | None = None, ignore: Sequence[str] = ()) -> None:
        self.pattern, self.ignore = None if extract is None else re.compile(extract), tuple(ignore)
        self.more = ("extracted",) if extract else ()

    def __call__(
        self, rows: Sequence[GenerativeRow], completions: Sequence[Sequence[str]], on_done: OnDone | None = None
    ) -> Scored:
        """Score all completions; `extracted` is the share of those in which the pattern was found."""
        found = [[self.answer(text) for text in of_row] for of_row in completions]
        values = []
        for row, answers in zip(rows, found, strict=True):
            right = {normalize(self.reference(answer), self.ignore) for answer in row.answers}
            values.append([float(a is not None and normalize(a, self.ignore) in right) for a in answers])
        flat = [answer for answers in found for answer in answers]
        if on_done is not None:
            on_done(len(flat))
        more = {"extracted": sum(a is not None for a in flat) / len(flat)} if self.pattern else {}
        return Scored(values, [["" if a is None else a for a in answers] for answers in found], more)

    def answer(self, completion: str) -> str | None:
        """The answer in a completion, None where the pattern is not found."""
        if self.pattern is None:
            return completion
        matches = list(self.pattern.finditer(completion))
        return (matches[-1][self.pattern.groups] or "") if matches else None

    def reference(self, cell: str) -> str:
        """The answer in a cell."""
        found = self.answer(cell)
        return cell if found is None else found


def normalize(text: str, ignore: Sequence[str] = ()) -> str:
    """The text as it is compared: without white space around it, and without what is to be ignored.

    spaces: runs of white space count as one space. articles, punctuation, case: as SQuAD does (Rajpurkar et al. 2016).
    number_format: a number is compared by value, whatever its thousands separators, currency or percent sign.

    >>> normalize(" The  Cat. ", ["case", "punctuation", "articles", "spaces"]), normalize("$1,200.00", ["number_format"])
    ('cat', '1200')
    """
    if "number_format" in ignore and (number := _number(text)) is not None:
        return number
    if "case" in ignore:
        text = text.lower()
    if "punctuation" in ignore:
        text = text.translate(str.maketrans("", "", string.punctuation))
    if "articles" in ignore:
        text = ARTICLES.sub(" ", text)
    if "spaces" in ignore:
        text = " ".join(text.split())
    return text.strip()


def _number(text: str) -> str | None:
    """The shortest spelling of a number, None for other texts."""
    try:
        value = float(text.strip().strip("$€£%").rstrip(".").replace(",", ""))
    except ValueError:
        return None
    if not math.isfinite(value):
        return None
    return str(int(value)) if value.is_integer() else repr(value)


class FunctionScore:
    """The number that a function of the user's gives to (completion, row), where row is all columns by name."""

    name, is_share, is_right, more = "score", False, False, ()

    def __init__(self, function: UserScore, option: str) -> None:
        self.function, self.option = function, option

    def __call__(
        self, rows: Sequence[GenerativeRow], completions: Sequence[Sequence[str]], on_done: OnDone | None = None
    ) -> Scored:
        """Score one completion after the other; ConfigError for a function that raises or gives no finite number."""
        values: list[list[float]] = []
        for n, (row, of_row) in enumerate(zip(rows, completions, strict=True), start=1):
            values.append([self._score(n, text, row) for text in of_row])
            if on_done is not None:
                on_done(len(of_row))
        return Scored(values, [[""] * len(of_row) for of_row in completions], {})

    def _score(self, n: int, text: str, row: GenerativeRow) -> float:
        """The number of one completion, of row n."""
        try:
            value = self.function(text, dict(row.record))
        except (Exception, SystemExit) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise ConfigError(f"{self.option}: raised {reason} for row {n}") from None
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise ConfigError(f"{self.option}: gave {str(value)[:60]} for row {n}; give a finite number")
        return number


class ExecutedTests:
    """1 where a program passes the tests of its row, run in the sandbox; shares of programs by how they ended."""

    name, is_share, is_right, more = "pass@1", True, True, REASONS[1:]  # the first is pass@1 itself

    def __init__(self, limits: Limits, protections: str = "") -> None:
        self.limits, self.protections = limits, protections  # the second in words

    def __call__(
        self, rows: Sequence[GenerativeRow], completions: Sequence[Sequence[str]], on_done: OnDone | None = None
    ) -> Scored:
        """Run every program; equal ones once."""
        programs = [[program_of(row, text) for text in of_row] for row, of_row in zip(rows, completions, strict=True)]
        distinct = list(dict.fromkeys(program for of_row in programs for program in of_row))
        outcomes = dict(zip(distinct, run_programs(distinct, self.limits, on_done=on_done), strict=True))
        if on_done is not None:
            on_done(sum(map(len, programs)) - len(distinct))
        ended = [[outcomes[program] for program in of_row] for of_row in programs]
        counts = Counter(outcome.reason for of_row in ended for outcome in of_row)
        shares = {reason: counts[reason] / counts.total() for reason in self.more}
        values = [[float(outcome.reason == PASSED) for outcome in of_row] for of_row in ended]
        notes = [[": ".join(filter(None, outcome)) for outcome in of_row] for of_row in ended]
        return Scored(values, notes, shares)


def program_of(row: GenerativeRow, completion: str) -> str:
    """The program of a completion with the tests of its row.

    The code is the first block in fences, if there is one (chat models), else the completion. Where the prompt begins the
    function, the code continues it; code that defines the function itself follows what stands before it in the prompt.
    """
    fenced = FENCED.search(completion)
    code = fenced[1] if fenced else completion
    start = row.start if row.begins_program else ""
    if start and re.search(rf"^def {re.escape(row.entry_point)}\b", code, re.MULTILINE):
        start = start[: start.index(f"def {row.entry_point}")]
    return f"{start}{code}\n\n{row.test}\n"


def summarize(scored: Scored, scorer: Scorer, ks: Sequence[int]) -> Metrics:
    """Metrics of a scored task: the mean with its interval, pass@k, and what the scorer adds.

    A row counts by the mean of its samples. Shares have Wilson's interval over rows, which is too wide rather than too
    narrow where rows have several samples.
    """
    n, means = len(scored.values), [sum(values) / len(values) for values in scored.values]
    metrics = with_interval(scorer.name, sum(means) / n, n) if scorer.is_share else mean_interval(scorer.name, means)
    for k in ks if scorer.is_right else ():
        if k > 1:
            shares = [pass_at_k(len(values), int(sum(values)), k) for values in scored.values]
            metrics |= with_interval(f"pass@{k}", sum(shares) / n, n)
    return {**metrics, **scored.more}


def metric_names(scorer: Scorer, ks: Sequence[int]) -> tuple[str, ...]:
    """Names of the metrics that `summarize` gives."""
    with_ends = [scorer.name, *(f"pass@{k}" for k in ks if k > 1 and scorer.is_right)]
    return (*(f"{name}{end}" for name in with_ends for end in ("", "_low", "_high")), *scorer.more)
