"""GRPO towards a reward that is a Python function: answers that are vowels. Overrides of the command line may follow."""

import csv
import json
import sys
from pathlib import Path

from genai_pl import train

SIZES = ("model.n_layer=2", "model.n_embd=64", "model.max_seq_len=64", "tokenizer=byte")


def vowels(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
    """The share of each completion that is vowels."""
    return [sum(letter in "aeiou" for letter in said) / max(1, len(said)) for said in completions]


def main(*overrides: str) -> list[float]:
    """The mean reward of each rollout that was logged."""
    base = train(*SIZES, "trainer.max_steps=60", *overrides)
    Path("prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": f"{n}: "}) + "\n" for n in range(64)), encoding="utf-8"
    )
    given = ("objective=grpo", f"init_from={base}", "data.path=prompts.jsonl", "data.batch_size=8")
    asked = (f"objective.reward={Path(__file__).stem}:vowels", "objective.max_new_tokens=8", "objective.group_size=4")
    run = train(*SIZES, *given, *asked, "trainer.max_steps=40", "optimizer.lr=1e-3", *overrides)
    with (run / "metrics.csv").open(encoding="utf-8") as file:
        return [float(row["objective/scores"]) for row in csv.DictReader(file) if row.get("objective/scores")]


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
