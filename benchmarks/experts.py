"""A mixture of experts against the dense model of equal FLOPs, trained with equal options and seeds on the shipped plays.

    python benchmarks/experts.py [--seeds 0 1 2] [--out FILE] [OVERRIDE ...]

For every seed both models are trained by train.py, in turn, with `tokenizer=byte precision=fp32` and the overrides. The
dense model is the mixture without experts, whose MLP is just wide enough for no fewer FLOPs per token, those of the router
included. Prints parameters, FLOPs of a trained token and validation losses (nats per token), and the difference by seed
with its mean and standard error.
"""

import argparse
import csv
import json
import math
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", help="a JSON file for the figures")
    parser.add_argument("overrides", nargs="*", help="of both runs, such as model.n_embd=48 trainer.max_steps=1000")
    args = parser.parse_args()
    mixture, dense, sizes = sides(args.overrides)
    for name, (parameters, flops) in sizes.items():
        print(f"{name:8s}  {parameters:>9,} parameters  {flops:>12,.0f} FLOPs per token", flush=True)
    losses: dict[str, list[float]] = {"dense": [], "mixture": []}
    for seed in args.seeds:
        for name, options in (("dense", dense), ("mixture", mixture)):
            losses[name].append(validation_loss(seed, [*args.overrides, *options]))
        pair = {name: values[-1] for name, values in losses.items()}
        print(f"seed {seed}    dense {pair['dense']:.4f}  mixture {pair['mixture']:.4f}", flush=True)
    report(losses)
    if args.out:
        Path(args.out).write_text(json.dumps({"sizes": sizes, "seeds": args.seeds, "losses": losses}, indent=1))


def sides(overrides: list[str]) -> tuple[list[str], list[str], dict[str, tuple[int, float]]]:
    """Options of the mixture and of the dense model, and parameters and FLOPs per token of both by name."""
    from hydra import compose, initialize_config_dir

    from genai_pl.cli.command import register
    from genai_pl.models import ModelConfig, build_model, flops_per_token, n_parameters

    register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        options = ["model=moe_nano", *(option for option in overrides if option.startswith("model"))]
        values = dict(compose("config", options).model)
    values = {name: value for name, value in values.items() if name in ModelConfig.__dataclass_fields__}

    def size(**other: object) -> tuple[int, float]:
        config = ModelConfig(**{**values, **other, "vocab_size": 258})
        model = build_model(config)
        return n_parameters(model), flops_per_token(model, config, config.max_seq_len)

    mixture = size()
    width = 1
    while size(n_experts=None, intermediate_size=width)[1] < mixture[1]:
        width += 1
    dense = ["model=moe_nano", "model.n_experts=null", f"model.intermediate_size={width}"]
    sizes = {"dense": size(n_experts=None, intermediate_size=width), "mixture": mixture}
    return ["model=moe_nano"], dense, sizes


def validation_loss(seed: int, options: list[str]) -> float:
    """The last validation loss of a run."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        fixed = ["tokenizer=byte", "precision=fp32", f"seed={seed}", f"hydra.run.dir={run}", "logger=csv"]
        command = [sys.executable, str(ROOT / "train.py"), *fixed, "callbacks.samples.every_n_steps=null", *options]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"error: {' '.join(command)}\n{(done.stderr or done.stdout).strip().splitlines()[-1]}")
        with (run / "metrics.csv").open() as file:
            return [float(row["val/loss"]) for row in csv.DictReader(file) if row["val/loss"]][-1]


def report(losses: dict[str, list[float]]) -> None:
    """Print means and standard deviations of both sides, and the mean difference with its standard error."""
    n = len(losses["dense"])
    for name, values in losses.items():
        spread = statistics.stdev(values) if n > 1 else 0.0
        print(f"{name:8s}  mean {statistics.mean(values):.4f}  standard deviation {spread:.4f}")
    differences = [m - d for d, m in zip(losses["dense"], losses["mixture"], strict=True)]
    error = statistics.stdev(differences) / math.sqrt(n) if n > 1 else 0.0
    listed = ", ".join(f"{difference:+.4f}" for difference in differences)
    print(f"mixture - dense: {listed}; mean {statistics.mean(differences):+.4f}, standard error {error:.4f}")


if __name__ == "__main__":
    main()
