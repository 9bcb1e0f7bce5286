"""A base, a LoRA adapter on it that imitates examples, and the merged model. Overrides of the command line may follow."""

import json
import sys
from pathlib import Path

from genai_pl import generate, load, train
from genai_pl.peft import adapters_disabled, merge

SIZES = ("model.n_layer=2", "model.n_embd=64", "model.max_seq_len=64", "tokenizer=byte", "trainer.max_steps=60")


def examples(path: Path) -> Path:
    """A file of prompts and completions: single digits spelled out."""
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    rows = [{"prompt": f"{n}=", "completion": name} for n, name in enumerate(names)] * 20
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def main(*overrides: str) -> dict[str, str]:
    """The answers of the base, of the adapter, and of the merged model."""
    base = train(*SIZES, *overrides)
    given = ("objective=sft", f"init_from={base}", "peft=lora", f"data.path={examples(Path('digits.jsonl'))}")
    run = train(
        *SIZES, *given, "peft.target_modules=all-linear", "optimizer.lr=1e-2", "trainer.max_steps=150", *overrides
    )
    loaded = load(str(run))
    options = {"max_new_tokens": 8, "temperature": 0.0}
    with adapters_disabled(loaded.model):
        answers = {"base": generate(loaded, "7=", **options)}
    answers["adapter"] = generate(loaded, "7=", **options)
    answers["merged"] = generate(loaded._replace(model=merge(loaded.model)), "7=", **options)
    return answers


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
