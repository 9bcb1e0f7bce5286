"""LoRA fine-tuning on real examples against peft in transformers' Trainer: python benchmarks/lora_speed.py MODEL DATA.jsonl

Both sides train the same adapter (rank 8 on q, k, v, o) with AdamW on the same tokenized examples, and predict completions
only, in float32. The peer pads a batch to its longest example, as its documentation sets it up; ours packs examples
into rows, as `objective=sft` does. The figure is examples per second and peak memory, in turns, each side in a process
of its own. `--equal` gives both sides the same padded batches.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from sides import PEFT, figures, fit, in_turns, ticks, training


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a Hugging Face folder of the Llama kind")
    parser.add_argument("data", help="lines of JSON with prompt and completion, or messages")
    parser.add_argument("--examples", type=int, default=12, help="of a batch of the peer")
    parser.add_argument("--seq-len", type=int, default=512, help="the longest example, and our row")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--equal", action="store_true", help="no packing: a row is an example on both sides")
    parser.add_argument("--side", choices=("ours", "peft"), help=argparse.SUPPRESS)
    return parser.parse_args()


def chat(args: argparse.Namespace, *, packing: bool, batch_size: int) -> object:
    """Our data module over the file."""
    from genai_pl.data.chat import ChatDataModule

    columns = {"messages": "messages", "prompt": "prompt", "completion": "completion"}
    return ChatDataModule(
        path=args.data, val_path=None, val_fraction=0.02, seq_len=args.seq_len, batch_size=batch_size, seed=0,
        val_batch_size=None, workers=0, shuffle=True, packing=packing, **columns,
    )  # fmt: skip


def ours(args: argparse.Namespace) -> dict[str, float]:
    """A run of our SFTModule in Lightning's Trainer."""
    from genai_pl.data import special_tokens
    from genai_pl.loading import load
    from genai_pl.modules.sft import SFTModule
    from genai_pl.peft import lora
    from genai_pl.training.library_messages import silence_libraries

    silence_libraries()
    model, tokenizer, _ = load(args.model)
    module = SFTModule(
        lora(model.train()), vocabulary=special_tokens(tokenizer, model.config.vocab_size), seed=0,
        **training(3e-4),
    )  # fmt: skip
    data = chat(args, packing=not args.equal, batch_size=args.examples if args.equal else 2)
    data.prepare(tokenizer, module.collator)
    examples: list[int] = []
    times = fit(
        module, data, args.steps + 1, seen=lambda batch: examples.append(int(batch["segment_ids"].amax(1).sum()))
    )
    return figures(times, sum(examples[1:]))


def peft(args: argparse.Namespace) -> dict[str, float]:
    """A run of peft's LoRA in transformers' Trainer on the examples that ours would pack."""
    import peft as library
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        DataCollatorForSeq2Seq,
        Trainer,
        TrainingArguments,
    )

    from genai_pl.data import special_tokens
    from genai_pl.objectives.sft import SFTCollator

    times: list[float] = []
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    data = chat(args, packing=False, batch_size=1)
    data.prepare(tokenizer, SFTCollator(vocabulary=special_tokens(tokenizer, model.config.vocab_size)))
    rows = []
    for n in range(min(len(data.train_rows), args.examples * (args.steps + 1))):
        row = data.train_rows[n]
        labels = torch.where(torch.as_tensor(row["loss_mask"]), torch.as_tensor(row["input_ids"]), -100)
        rows.append({"input_ids": row["input_ids"].tolist(), "labels": labels.tolist()})
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            output_dir=folder, max_steps=args.steps + 1, per_device_train_batch_size=args.examples, report_to=[],
            save_strategy="no", logging_strategy="no", disable_tqdm=True, use_cpu=True, max_grad_norm=0.0,
            learning_rate=3e-4, dataloader_pin_memory=False,
        )  # fmt: skip
        model = library.get_peft_model(model, library.LoraConfig(**PEFT))
        collate = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)
        Trainer(model=model, args=settings, train_dataset=rows, data_collator=collate, callbacks=[ticks(times)]).train()
    return figures(times, args.examples * (len(times) - 1))


def main() -> None:
    args = parse()
    if not (Path(args.model) / "config.json").is_file() or not Path(args.data).is_file():
        sys.exit(f"error: no model in {args.model}, or no file {args.data}")
    sides = {"ours": lambda: ours(args), "peft": lambda: peft(args)}
    in_turns(sides, args.side, "examples", turns=args.pairs)


if __name__ == "__main__":
    main()
