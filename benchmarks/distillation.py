"""Distillation against text alone at equal tokens: python benchmarks/distillation.py MODEL TRAIN TUNE TEST LAMBADA --out RUNS

Trains one student, some layers of MODEL, in two arms: objective=clm on the text of TRAIN, and objective=distill with MODEL's
64 likeliest tokens of each position, which are written to disk once. All else is equal: rows, their order, steps, schedule.
Each arm takes the learning rate with the fewest bits per byte on TUNE after half the steps with seed 0, the second then the
share of cross entropy (alpha) likewise, and is then trained with every seed; measured are bits per byte of TEST and the last
words of LAMBADA. A run that has ended is not repeated.
"""

import argparse
import csv
import json
import math
import shutil
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from genai_pl.api import train

KEPT = "[0,1,2,3,4,5,6,27,28,29]"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "train", "tune", "test", "lambada"):
        parser.add_argument(name)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs and of figures.json")
    parser.add_argument("--layers", default=KEPT, help="layers of the student")
    parser.add_argument("--steps", type=int, default=24, help="of 512 tokens")
    parser.add_argument("--rates", type=float, nargs="+", default=[4e-4, 1.2e-3])
    parser.add_argument(
        "--alphas", type=float, nargs="+", default=[0.0, 0.5], help="shares of cross entropy to choose from"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--limit", type=int, default=120, help="passages of LAMBADA")
    return parser.parse_args()


def main() -> None:
    options = parse()
    arms = {"text": ["objective=clm"], "teacher": [*teacher_options(options), "objective.alpha=0"]}
    best = {
        arm: fewest(options.rates, lambda rate, arm=arm: tuned(options, arms[arm], f"tune-{arm}-{rate:g}", rate), arm)
        for arm in arms
    }
    rate = best["teacher"]  # the share of cross entropy, at the rate that is best without it

    def of_alpha(alpha: float) -> float:
        name = f"tune-teacher-{rate:g}" + (f"-alpha-{alpha:g}" if alpha else "")
        return tuned(options, [*teacher_options(options), f"objective.alpha={alpha}"], name, rate)

    arms["teacher"][-1] = f"objective.alpha={fewest(options.alphas, of_alpha, 'alpha')}"
    found = {arm: [] for arm in arms}
    for seed in range(options.seeds):  # seed by seed: an interrupted comparison is still one of pairs
        for arm in arms:
            found[arm].append(figures(options, arms[arm], f"{arm}-{seed}", best[arm], seed=seed))
    report(found)


def tuned(options: argparse.Namespace, arm: list[str], name: str, rate: float) -> float:
    """Bits per byte of TUNE after half the steps, with seed 0."""
    return figures(options, arm, name, rate)["val/bpb"]


def fewest(choices: Sequence[float], bits: Callable[[float], float], what: str) -> float:
    """The choice with the fewest bits per byte of TUNE, which is printed; nothing runs where there is one choice."""
    if len(choices) == 1:
        return choices[0]
    found = {choice: bits(choice) for choice in choices}
    best = min(found, key=found.get)
    print(f"{what}: bits per byte of TUNE {found}: {best:g}", flush=True)
    return best


def teacher_options(options: argparse.Namespace) -> list[str]:
    """The options of the arm with a teacher, whose files lie beside the runs."""
    cache = f"objective.teacher_cache={options.out / 'teacher'}"
    return ["objective=distill", f"objective.teacher={options.model}", "objective.top_k=64", cache]


def figures(
    options: argparse.Namespace, arm: list[str], name: str, rate: float, *, seed: int | None = None
) -> dict[str, float]:
    """The last figures of a run, which is made unless figures.json has them; seed None: of half the steps, to tune."""
    path, tunes = options.out / "figures.json", seed is None
    steps = options.steps // 2 if tunes else options.steps
    known = json.loads(path.read_text()) if path.exists() else {}
    if name not in known:
        folder = options.out / name
        shutil.rmtree(folder, ignore_errors=True)
        common = [*common_options(options), *([] if tunes else task_options(options, steps))]
        run = [f"optimizer.lr={rate}", f"seed={seed or 0}", f"trainer.max_steps={steps}", f"hydra.run.dir={folder}"]
        train(*arm, *common, *run)
        with (folder / "metrics.csv").open() as file:
            rows = list(csv.DictReader(file))
        known[name] = {key: float(row[key]) for row in rows for key in row if row[key]}
        path.write_text(json.dumps(known, indent=1))
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    print(name, {key: value for key, value in known[name].items() if key.startswith(("val/", "eval/"))}, flush=True)
    return known[name]


def common_options(options: argparse.Namespace) -> list[str]:
    """What both arms have in common."""
    return [
        *(f"init_from={options.model}", f"init_layers={options.layers}"),
        *(f"data.path={options.train}", f"data.val_path={options.tune}", "data.seq_len=256", "data.batch_size=2"),
        *("optimizer=adamw", "scheduler.warmup_steps=4", "precision=bf16"),
        *("trainer.limit_val_batches=5", "callbacks.samples.every_n_steps=null", "callbacks.export=false"),
    ]


def task_options(options: argparse.Namespace, steps: int) -> list[str]:
    """What is measured at the end."""
    return [
        f"eval.every_n_steps={steps}",
        f"eval.tasks.lambada={{path: {options.lambada}, limit: {options.limit}}}",
        f"eval.tasks.test={{path: {options.test}, limit: null}}",
    ]


def report(found: dict[str, list[dict[str, float]]]) -> None:
    """Print mean and standard error over seeds of each arm, and the paired t of the difference, by figure."""
    text, teacher = found["text"], found["teacher"]
    for key in sorted(key for key in text[0] if key.startswith(("val/bpb", "eval/"))):
        values = [[run[key] for run in runs] for runs in (text, teacher)]
        gains = [b - a for a, b in zip(*values, strict=True)]
        print(f"{key:32} text {summary(values[0])}  teacher {summary(values[1])}  difference {summary(gains)}", end="")
        error = standard_error(gains)
        print(f"  t({len(gains) - 1}) = {statistics.mean(gains) / error:.2f}" if error else "")


def summary(values: list[float]) -> str:
    return f"{statistics.mean(values):.4f} +- {standard_error(values):.4f}"


def standard_error(values: list[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


if __name__ == "__main__":
    main()
