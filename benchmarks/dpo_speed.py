"""DPO with LoRA against TRL's DPOTrainer on the same pairs: python benchmarks/dpo_speed.py MODEL PAIRS.jsonl [--peer-python PATH]

Both sides train rank 8 on q, k, v, o with AdamW in float32, cut pairs to the same length, and have the base without its
adapter as the reference. The figure is pairs per second after the first step and peak memory, in turns, each side in a
process of its own; --peer-python is one that has trl 1.16 and peft. `--precompute` lets both ask the reference before.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time

from sides import figures, measured


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
    import lightning as L

    from genai_pl.data import vocabulary
    from genai_pl.data.preferences import PreferenceDataModule
    from genai_pl.loading import load
    from genai_pl.modules.preference import PreferenceModule
    from genai_pl.optim import adamw, constant
    from genai_pl.peft import lora
    from genai_pl.run import quiet

    quiet()
    times: list[float] = []

    class Ticks(L.Callback):
        def on_train_batch_end(self, *_: object) -> None:
            times.append(time.perf_counter())

    model, tokenizer, _ = load(args.model)
    with tempfile.TemporaryDirectory() as folder:
        with open(f"{folder}/pairs.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in [*pairs(args), pairs(args)[0]])
        module = PreferenceModule(
            lora(model.train()), vocabulary=vocabulary(tokenizer, model.config.vocab_size), seed=0,
            precompute_reference=args.precompute, reference_cache=folder,
            optimizer=lambda named: adamw(named, lr=3e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0),
            schedule=lambda step, total_steps: constant(step, total_steps=total_steps, warmup_steps=0),
        )  # fmt: skip
        data = PreferenceDataModule(
            path=f"{folder}/pairs.jsonl", val_path=None, val_fraction=1e-9, prompt="prompt", chosen="chosen",
            rejected="rejected", completions="completions", margin=None, seq_len=args.seq_len, batch_size=args.batch,
            val_batch_size=None, workers=0, shuffle=False, seed=0,
        )  # fmt: skip
        data.prepare(tokenizer, module.collator)
        L.Trainer(
            max_steps=args.steps + 1, limit_val_batches=0, accelerator="cpu", logger=False, callbacks=[Ticks()],
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        ).fit(module, data)  # fmt: skip
    return figures(times, args.batch * (len(times) - 1))


def trl(args: argparse.Namespace) -> dict[str, float]:
    """A run of TRL's DPOTrainer."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    times: list[float] = []

    class Ticks(TrainerCallback):
        def on_step_end(self, *_: object, **__: object) -> None:
            times.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        settings = DPOConfig(
            output_dir=folder, max_steps=args.steps + 1, per_device_train_batch_size=args.batch, report_to=[],
            save_strategy="no", logging_strategy="no", disable_tqdm=True, use_cpu=True, learning_rate=3e-4,
            max_length=args.seq_len, precompute_ref_log_probs=args.precompute, dataloader_pin_memory=False, bf16=False,
            gradient_checkpointing=False,
        )  # fmt: skip
        targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
        DPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32), args=settings,
            train_dataset=Dataset.from_list(pairs(args)), callbacks=[Ticks()],
            processing_class=AutoTokenizer.from_pretrained(args.model),
            peft_config=LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM"),
        ).train()  # fmt: skip
    return figures(times, args.batch * (len(times) - 1))


def main() -> None:
    args = parse()
    if args.side:
        print(json.dumps({"ours": ours, "trl": trl}[args.side](args)))
        return
    ratios = []
    for turn in range(1, args.turns + 1):
        mine, theirs = measured("ours"), measured("trl", python=args.peer_python)
        ratios.append(mine["rate"] / theirs["rate"])
        print(
            f"turn {turn}: ours {mine['rate']:.2f} pairs/s, {mine['gib']:.2f} GiB   trl {theirs['rate']:.2f}, "
            f"{theirs['gib']:.2f} GiB   ratio {ratios[-1]:.2f}",
            flush=True,
        )
    print(f"median ratio {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
