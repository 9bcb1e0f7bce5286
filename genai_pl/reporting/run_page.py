"""The report of one run: what was trained on what, its curves, samples, evaluations, warnings, command and environment."""

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import NamedTuple

from genai_pl.reporting import page
from genai_pl.reporting.chart import Series, legend, line_chart, number

Curves = Mapping[str, tuple[Sequence[int], Sequence[float]]]
LOSS = ("train/loss", "val/loss")
FIRST = ("train/lr", "train/grad_norm", "train/tokens_per_sec")  # charts of their own, in this order
LEFT_OUT = ("train/tokens_seen", "train/mfu", "train/data_wait", "train/memory_gib")
NAMES = {
    "train/lr": "learning rate",
    "train/grad_norm": "gradient norm",
    "train/tokens_per_sec": "tokens per second",
    "train/loss": "training",
    "val/loss": "validation",
}
MAX_SAMPLES = 60  # texts shown
BOUNDS = ("_low", "_high")  # ends of names of an interval


class Sample(NamedTuple):
    """A text that the model has generated."""

    step: int
    prompt: str
    text: str


class RunFacts(NamedTuple):
    """What the page shows.

    title: of the run. summary: heading to line, as printed at the start. results: names to values at the end.
    curves: metric to (steps, values). best: (metric, step, value) of the best validation. samples: in order of steps.
    notes: warnings and changes, as printed. command: to repeat the run. resume: to continue it.
    environment: name to version or device.
    """

    title: str
    summary: Mapping[str, str]
    results: Mapping[str, float]
    curves: Curves
    samples: Sequence[Sample]
    notes: Sequence[str]
    command: str
    resume: str
    environment: Mapping[str, str]
    best: tuple[str, int, float] | None = None


def run_page(facts: RunFacts) -> str:
    """The HTML file."""
    heading = f"<h1>{escape(facts.title)}</h1>"
    if "data" in facts.summary:
        heading += f'<p class="soft">{escape(facts.summary["data"])}</p>'
    summary = [(name, text) for name, text in facts.summary.items() if name != "data"]
    return page.page(
        facts.title,
        [
            heading,
            page.figures(_figures(facts)),
            page.section("Curves", *_curves(facts)),
            page.section("Evaluation", _evaluation(facts)),
            page.section("Samples", *_samples(facts.samples)),
            page.section("Warnings and changes", _notes(facts.notes)),
            page.section("Run", page.table(("", ""), summary)),
            page.section("Repeat", page.preformatted(facts.command), _described("continue it", facts.resume)),
            page.section("Environment", page.table(("", ""), list(facts.environment.items()))),
        ],
    )


def evaluation(results: Mapping[str, float]) -> list[tuple[str, str, str, str]]:
    """Rows of metric, value at the end, its interval, and value at the best step; bounds are no rows of their own."""
    rows = []
    for name, value in results.items():
        if name.startswith("best/") or (name.endswith(BOUNDS) and name.rpartition("_")[0] in results):
            continue
        bounds = [results.get(name + end) for end in BOUNDS]
        interval = "" if None in bounds else f"{number(bounds[0])} to {number(bounds[1])}"
        best = results.get(f"best/{name}")
        rows.append((name, number(value), interval, "" if best is None else number(best)))
    return rows


def _evaluation(facts: RunFacts) -> str:
    """The table, without columns that are empty."""
    heads = ("metric", "at the end", "95 % interval", f"at step {facts.best[1]:,}, the best" if facts.best else "best")
    rows = evaluation(facts.results)
    kept = [n for n in range(len(heads)) if n < 2 or any(row[n] for row in rows)]
    return page.table([heads[n] for n in kept], [[row[n] for n in kept] for row in rows], numbers=1)


def _figures(facts: RunFacts) -> dict[str, str]:
    """The large numbers at the top."""
    found: dict[str, str] = {}
    if facts.best is not None:
        metric, step, value = facts.best
        found[f"best {metric}, step {step:,}"] = number(value)
    for name in ("val/loss", "val/accuracy", "val/perplexity", "val/scores", "val/f1"):
        if name in facts.results:
            found[f"{name} at the end"] = number(facts.results[name])
    curves = facts.curves
    if "train/loss" in curves:
        steps, values = curves["train/loss"]
        found |= {"last train/loss": number(values[-1]), "steps": f"{steps[-1]:,}"}
    if "train/tokens_seen" in curves:
        found["tokens"] = number(curves["train/tokens_seen"][1][-1])
    if "train/tokens_per_sec" in curves:
        rates = sorted(curves["train/tokens_per_sec"][1])
        found["tokens per second (median)"] = number(rates[len(rates) // 2])
    if "train/memory_gib" in curves:
        found["peak memory, GiB"] = number(max(curves["train/memory_gib"][1]))
    return found


def _curves(facts: RunFacts) -> list[str]:
    """Charts: losses first, then rates, other metrics of the validation, and groups by prefix."""
    curves, mark = facts.curves, None if facts.best is None else facts.best[1]
    cards = [_card("loss", [name for name in LOSS if name in curves], curves, mark=mark)]
    used = {*LOSS, *LEFT_OUT, *FIRST}
    # losses by source or task
    for kind in LOSS:
        names = [name for name in curves if name.startswith(f"{kind}/")]
        cards.append(_card(f"{NAMES[kind]} loss by source", names, curves, mark=mark, strip=f"{kind}/"))
        used |= set(names)
    cards += [_card(NAMES[name], [name], curves) for name in FIRST if name in curves]
    # one chart for each metric of training and validation, one for each group of the others
    rest = [name for name in curves if name not in used and not _is_bound(name, curves)]
    shared = dict.fromkeys(name.partition("/")[2] for name in rest if name.startswith(("train/", "val/")))
    for part in [part for part in shared if "/" not in part]:
        names = [name for name in (f"train/{part}", f"val/{part}") if name in rest]
        words = {"train": "training", "val": "validation"}
        named = {name: words[name.partition("/")[0]] for name in names}
        heading = part.replace("_", " ") if len(names) > 1 else names[0]
        cards.append(_card(heading, names, curves, mark=mark if names[-1].startswith("val/") else None, names=named))
        rest = [name for name in rest if name not in names]
    groups: dict[str, list[str]] = {}
    for name in rest:
        own = name.startswith(("val/", "eval/")) or name.count("/") == 0
        groups.setdefault(name if own else name.rpartition("/")[0], []).append(name)
    for group, names in groups.items():
        cards.append(
            _card(group, names, curves, mark=mark if group.startswith(("val/", "eval/")) else None, strip=f"{group}/")
        )
    return [page.charts(cards)]


def _card(
    heading: str,
    metrics: Sequence[str],
    curves: Curves,
    *,
    mark: int | None = None,
    strip: str = "",
    names: Mapping[str, str] = NAMES,
) -> str:
    """A chart of these metrics, with the last value of a single one.

    strip: beginning of their names that the heading has. names: words in the place of names.
    """
    series = [_series(m, curves, m.removeprefix(strip) if strip else names.get(m, m)) for m in metrics]
    values = [value for s in series for value in s.values if math.isfinite(value)]
    if not values:
        return ""
    note = f"last {number(series[0].values[-1])}" if len(series) == 1 else ""
    return page.card(heading, line_chart(series, mark=mark), note=note, below=legend(series))


def _series(name: str, curves: Curves, shown: str) -> Series:
    """The line of a metric, with its interval where that has the same steps."""
    steps, values = curves[name]
    low, high = (curves.get(name + end, ((), ())) for end in BOUNDS)
    if list(low[0]) == list(steps) == list(high[0]):
        return Series(shown, steps, values, low[1], high[1])
    return Series(shown, steps, values)


def _is_bound(name: str, curves: Curves) -> bool:
    """Whether a metric is an end of another one's interval."""
    return name.endswith(BOUNDS) and name.rpartition("_")[0] in curves


def _samples(samples: Sequence[Sample]) -> list[str]:
    """The first, some between and the last texts: the last step open, earlier ones folded."""
    if not samples:
        return []
    stride = -(-len(samples) // MAX_SAMPLES)
    shown = [*samples[:-1:stride], samples[-1]]
    by_step: dict[int, list[Sample]] = {}
    for sample in shown:
        by_step.setdefault(sample.step, []).append(sample)
    parts = []
    for step, texts in sorted(by_step.items(), reverse=True):
        body = "".join(page.preformatted(sample.text, soft=sample.prompt) for sample in texts)
        is_open = " open" if step == samples[-1].step else ""
        parts.append(f"<details{is_open}><summary>step {step:,}</summary>{body}</details>")
    return parts


def _notes(notes: Iterable[str]) -> str:
    """The lines as a list."""
    items = "".join(f"<li>{escape(line)}</li>" for line in notes)
    return f'<ul class="notes">{items}</ul>' if items else '<p class="soft">none</p>'


def _described(words: str, command: str) -> str:
    return f'<p class="soft">To {words}:</p>{page.preformatted(command)}' if command else ""
