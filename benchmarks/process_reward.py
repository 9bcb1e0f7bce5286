"""Process rewards against rewards of the whole answer, in PPO at equal rollouts: python benchmarks/process_reward.py OUT

Digits are added modulo 10 step by step (`7+5+9+3+8=`, then `7+5=2`, `2+9=1`, `1+3=4`, `4+8=2`, a line each). A small model
over bytes learns them by SFT from nothing, samples answers to problems it has not seen, and a process reward model learns
from those which steps are correct, by a rule. PPO then starts from the SFT model, once for each arm and seed: `dense` (the
probability of each step, given at its end), `min`, `last`, and `rule` (a function: 1 where the whole answer is correct, without
the reward model). Printed is the share of held-out problems with a correct answer, by greedy decoding and by one sample at
temperature 1, where an answer is correct if all its steps are. A run that has ended is not repeated.
"""

import argparse
import json
import random
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path

from genai_pl.api import generate, train
from genai_pl.loading import load
from genai_pl.models import prepare_for_decoding

ARMS = ("rule", "dense", "min", "last")
SHAPE = ["tokenizer=byte", "model.n_layer=3", "model.n_embd=96", "model.max_seq_len=64"]
NEW = 28  # tokens of an answer at most; a correct one has 24 and an end token


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the files, the runs and figures.json")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sft-steps", type=int, default=225)
    parser.add_argument("--judge-steps", type=int, default=1500)
    parser.add_argument("--rollouts", type=int, default=40, help="of 64 completions")
    parser.add_argument("--rate", type=float, default=2e-4, help="learning rate of PPO")
    return parser.parse_args()


def steps(numbers: Sequence[int]) -> list[str]:
    """The steps of a sum."""
    sums = [sum(numbers[: n + 1]) % 10 for n in range(len(numbers))]
    return [f"{sums[n]}+{number}={sums[n + 1]}" for n, number in enumerate(numbers[1:])]


def labels(numbers: Sequence[int], answer: Sequence[str]) -> list[bool]:
    """Whether each step of an answer is correct: it goes on from the step before it, and adds the next number right."""
    found, total = [], str(numbers[0])
    for n, step in enumerate(answer):
        left, _, right = step.partition("=")
        expected = f"{total}+{numbers[n + 1]}" if n + 1 < len(numbers) else None
        known = left == expected and total.isdigit()
        found.append(known and right == str((int(total) + numbers[n + 1]) % 10))
        total = right
    return found


def correct(prompt: str, completion: str) -> bool:
    return completion.strip("\n").split("\n") == steps(numbers_of(prompt))


def numbers_of(prompt: str) -> list[int]:
    return [int(number) for number in prompt.rstrip("=").split("+")]


def rule(prompts: Sequence[str], completions: Sequence[str], **_: object) -> list[float]:
    """The reward of the arm `rule`."""
    return [float(correct(*pair)) for pair in zip(prompts, completions, strict=True)]


def write(path: Path, rows: Sequence[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def problems(count: int) -> list[str]:
    """Distinct sums of five digits."""
    draw = random.Random(0)
    found: dict[str, None] = {}
    while len(found) < count:
        found["+".join(str(draw.randint(0, 9)) for _ in range(5)) + "="] = None
    return list(found)


def run(folder: Path, *overrides: str) -> Path:
    """The folder of a run, which is made unless it has ended."""
    if not (folder / "done").exists():
        shutil.rmtree(folder, ignore_errors=True)
        train(*overrides, f"hydra.run.dir={folder}", "callbacks.samples.every_n_steps=null")
        (folder / "done").touch()
    return folder


def stages(options: argparse.Namespace) -> tuple[Path, Path]:
    """(SFT model, process reward model), with the files that all runs read."""
    out = options.out
    out.mkdir(parents=True, exist_ok=True)
    sums = problems(6100)
    parts = {"sft": sums[:1500], "steps": sums[1500:4000], "prompts": sums[4000:5600], "held": sums[5600:]}
    rows = [{"prompt": text, "completion": "\n".join(steps(numbers_of(text))) + "\n"} for text in parts["sft"]]
    write(out / "sft.jsonl", rows)
    write(out / "prompts.jsonl", [{"prompt": text} for text in parts["prompts"]])
    write(out / "held.jsonl", [{"prompt": text} for text in parts["held"]])
    common = ["data.val_fraction=0.02", "data.batch_size=16", "scheduler.warmup_steps=20"]
    sft = run(
        out / "sft", "objective=sft", f"data.path={out / 'sft.jsonl'}", *SHAPE, *common,
        f"trainer.max_steps={options.sft_steps}",
    )  # fmt: skip
    if not (out / "steps.jsonl").exists():
        sampled = []
        for seed in range(4):  # as many answers of each problem
            answers = generate(str(sft), parts["steps"], seed=seed, max_new_tokens=NEW, temperature=1.0)
            for prompt, answer in zip(parts["steps"], answers, strict=True):
                lines = [line for line in answer.strip("\n").split("\n") if line]
                if lines:
                    judged = labels(numbers_of(prompt), lines)
                    sampled.append({"prompt": prompt, "completions": lines, "labels": judged})
        write(out / "steps.jsonl", sampled)
    judge = run(
        out / "judge", "objective=process_reward", f"init_from={sft}", f"data.path={out / 'steps.jsonl'}", *common[:2],
        "scheduler.warmup_steps=50", f"trainer.max_steps={options.judge_steps}",
        f"trainer.val_check_interval={options.judge_steps}",
    )  # fmt: skip
    return sft, judge


def right(model: str, prompts: Sequence[str], temperature: float) -> float:
    """The share of problems with a correct answer."""
    loaded = load(model)
    prepare_for_decoding(loaded.model)
    answers = generate(loaded, prompts, max_new_tokens=NEW, temperature=temperature)
    return statistics.mean(correct(*pair) for pair in zip(prompts, answers, strict=True))


def main() -> None:
    options = parse()
    sft, judge = stages(options)
    held = [json.loads(line)["prompt"] for line in (options.out / "held.jsonl").read_text().splitlines()]
    path = options.out / "figures.json"
    known = json.loads(path.read_text()) if path.exists() else {}

    def figures(name: str, model: Path) -> tuple[float, float]:
        if name not in known:
            known[name] = (right(str(model), held, 0.0), right(str(model), held, 1.0))
            path.write_text(json.dumps(known, indent=1))
        print(f"{name:12} greedy {known[name][0]:.3f}  sampled {known[name][1]:.3f}", flush=True)
        return known[name]

    figures("sft", sft)
    found: dict[str, list[tuple[float, float]]] = {arm: [] for arm in ARMS}
    for seed in range(options.seeds):
        for arm in ARMS:
            reward = [f"objective.reward={Path(__file__).resolve()}:rule"]
            if arm != "rule":
                reward = [f"objective.reward={judge}", f"objective.step_rewards={arm}"]
            folder = run(
                options.out / f"{arm}-{seed}", "objective=ppo", f"init_from={sft}", *reward, f"seed={seed}",
                f"data.path={options.out / 'prompts.jsonl'}", "data.val_fraction=0.02", "data.batch_size=64",
                f"objective.max_new_tokens={NEW}", "objective.epochs=2", "objective.minibatch_size=64", "optimizer=adamw",
                f"optimizer.lr={options.rate}", "scheduler.warmup_steps=4", f"trainer.max_steps={2 * options.rollouts}",
                f"trainer.val_check_interval={2 * options.rollouts}",
            )  # fmt: skip
            found[arm].append(figures(f"{arm}-{seed}", folder))
    for arm, pairs in found.items():
        for name, values in zip(("greedy", "sampled"), zip(*pairs, strict=True), strict=True):
            error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
            print(f"{arm:8} {name:8} {statistics.mean(values):.3f} +- {error:.3f}")


if __name__ == "__main__":
    main()
