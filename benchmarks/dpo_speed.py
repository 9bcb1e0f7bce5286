"""DPO with LoRA against TRL's DPOTrainer on the same pairs: python benchmarks/dpo_speed.py MODEL PAIRS.jsonl [--peer-python PATH]

Both sides train rank 8 on q, k, v, o with AdamW in float32, cut pairs to the same length, and have the base without its
adapter as the reference. The figure is pairs per second after the first step and peak memory, in turns, each side in a
process of its own; --peer-python is one that has trl 1.16 and peft. `--precompute` lets both ask the reference before.
"""

import argparse
import json
import sys
import tempfile

from sides import PEFT, figures, fit, in_turns, ticks, training, trl_settings


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a Hugging Face folder of the Llama kind")
    parser.add_argument("data", help="lines of JSON with prompt, chosen and rejected")
    parser.add_argument("--batch", type=int, default=8, help="pairs of a step")
    parser.add_argument("--seq-len", type=int, default=256, help="tokens of a prompt with one completion")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--precompute", action="store_true")
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--side", choices=("ours", "trl"), help=argparse.SUPPRESS)
    return parser.parse_args()


def pairs(args: argparse.Namespace) -> list[dict[str, str]]:
    """As many rows as the steps take."""
    with open(args.data, encoding="utf-8") as file:
        return [json.loads(line) for _, line in zip(range(args.batch * (args.steps + 1)), file, strict=False)]


def ours(args: argparse.Namespace) -> dict[str, float]:
    """A run of our PreferenceModule in Lightning's Trainer."""
    from genai_pl.data import special_tokens
    from genai_pl.data.preference import PreferenceDataModule
    from genai_pl.loading import load
    from genai_pl.modules.preference import PreferenceModule
    from genai_pl.peft import lora
    from genai_pl.training.library_messages import silence_libraries

    silence_libraries()
    model, tokenizer, _ = load(args.model)
    with tempfile.TemporaryDirectory() as folder:
        with open(f"{folder}/pairs.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in [*pairs(args), pairs(args)[0]])
        module = PreferenceModule(
            lora(model.train()), vocabulary=special_tokens(tokenizer, model.config.vocab_size), seed=0,
            precompute_reference=args.precompute, reference_cache=folder,
            **training(3e-4),
        )  # fmt: skip
        data = PreferenceDataModule(
            path=f"{folder}/pairs.jsonl", val_path=None, val_fraction=1e-9, prompt="prompt", chosen="chosen",
            rejected="rejected", completions="completions", margin=None, seq_len=args.seq_len, batch_size=args.batch,
            val_batch_size=None, workers=0, shuffle=False, seed=0,
        )  # fmt: skip
        data.prepare(tokenizer, module.collator)
        times = fit(module, data, args.steps + 1)
    return figures(times, args.batch * (len(times) - 1))


def trl(args: argparse.Namespace) -> dict[str, float]:
    """A run of TRL's DPOTrainer."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    times: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        settings = DPOConfig(
            max_steps=args.steps + 1, per_device_train_batch_size=args.batch, learning_rate=3e-4, max_length=args.seq_len,
            precompute_ref_log_probs=args.precompute, **trl_settings(folder),
        )  # fmt: skip
        DPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32), args=settings,
            train_dataset=Dataset.from_list(pairs(args)), callbacks=[ticks(times)],
            processing_class=AutoTokenizer.from_pretrained(args.model),
            peft_config=LoraConfig(**PEFT),
        ).train()  # fmt: skip
    return figures(times, args.batch * (len(times) - 1))


def main() -> None:
    args = parse()
    sides = {"ours": lambda: ours(args), "trl": lambda: trl(args)}
    in_turns(sides, args.side, "pairs", turns=args.turns, python=args.peer_python)


if __name__ == "__main__":
    main()
