"""Distillation against text alone at equal tokens: python benchmarks/distillation.py MODEL TRAIN TUNE TEST LAMBADA --out RUNS

Trains one student, some layers of MODEL, in two arms: objective=clm on the text of TRAIN, and objective=distill with MODEL's
64 likeliest tokens of each position as the only target (alpha=0), which are written to disk once. All else is equal: rows,
their order, steps, schedule. Each arm takes the learning rate with the fewest bits per byte on TUNE with seed 0, and is then
trained with every seed; measured are bits per byte of TEST and the last words of LAMBADA. A run that has ended is not repeated.
"""

import argparse
import csv
import json
import math
import shutil
import statistics
from pathlib import Path

from genai_pl.api import train

KEPT = "[0,1,2,3,4,5,6,27,28,29]"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "train", "tune", "test", "lambada"):
        parser.add_argument(name)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs and of figures.json")
    parser.add_argument("--layers", default=KEPT, help="layers of the student")
    parser.add_argument("--steps", type=int, default=40, help="of 512 tokens")
    parser.add_argument("--rates", type=float, nargs="+", default=[4e-4, 1.2e-3])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--limit", type=int, default=250, help="passages of LAMBADA")
    return parser.parse_args()


def main() -> None:
    options = parse()
    arms = {"text": ["objective=clm"], "teacher": teacher_options(options)}
    best = {}
    for arm in arms:
        of_rate = {rate: figures(options, arms, arm, rate, seed=0)["val/bpb"] for rate in options.rates}
        best[arm] = min(of_rate, key=of_rate.get)
        print(f"{arm}: bits per byte of TUNE by rate {of_rate}: {best[arm]:g}", flush=True)
    found = {arm: [] for arm in arms}
    for seed in range(options.seeds):  # seed by seed: an interrupted comparison is still one of pairs
        for arm in arms:
            found[arm].append(figures(options, arms, arm, best[arm], seed=seed))
    report(found)


def teacher_options(options: argparse.Namespace) -> list[str]:
    """The options of the arm with a teacher, whose files lie beside the runs."""
    cache = f"objective.teacher_cache={options.out / 'teacher'}"
    return ["objective=distill", f"objective.teacher={options.model}", "objective.top_k=64", "objective.alpha=0", cache]


def figures(options: argparse.Namespace, arms: dict, arm: str, rate: float, *, seed: int) -> dict[str, float]:
    """The last figures of a run, which is made unless figures.json has them."""
    path, name = options.out / "figures.json", f"{arm}-{rate:g}-{seed}"
    known = json.loads(path.read_text()) if path.exists() else {}
    if name not in known:
        folder = options.out / name
        shutil.rmtree(folder, ignore_errors=True)
        train(*arms[arm], *common_options(options), f"optimizer.lr={rate}", f"seed={seed}", f"hydra.run.dir={folder}")
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
        *("optimizer=adamw", "scheduler.warmup_steps=5", "precision=bf16", f"trainer.max_steps={options.steps}"),
        *("trainer.limit_val_batches=10", "callbacks.samples.every_n_steps=null", "callbacks.export=false"),
        f"eval.every_n_steps={options.steps}",
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
