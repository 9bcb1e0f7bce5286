"""Training speed against a peer on the same shape, data and machine: python benchmarks/train_speed.py [--peer NAME]

Peers: transformers (GPT2LMHeadModel in its Trainer; needs accelerate) and loop (GPT2LMHeadModel in a plain loop with
AdamW). Both sides take turns, `--pairs` times; tokens per second and their ratio are medians. One step is
`--batch-size` rows of `--seq-len` random tokens, in `--precision`, GPT-2's shape, dropout 0, AdamW, no clipping.
"""

import argparse
import json
import statistics
import tempfile
import time

import torch
from sides import measured

VOCABULARY = 50257


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", choices=("transformers", "loop"), default="transformers")
    parser.add_argument("--n-layer", type=int, default=6)
    parser.add_argument("--n-embd", type=int, default=384)
    parser.add_argument("--n-head", type=int, default=6)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--vocab-size", type=int, default=VOCABULARY)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--precision", choices=("32-true", "bf16-mixed"), default="32-true", help="of both sides")
    parser.add_argument("--compile", action="store_true", help="compile our blocks")
    parser.add_argument("--side", choices=("ours", "transformers", "loop"), help=argparse.SUPPRESS)
    return parser.parse_args()


def rows(args: argparse.Namespace, n: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, args.vocab_size, (n, args.seq_len + 1), generator=generator)


class Clock:
    """Tokens per second between the end of the second step and the end of the last."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.tokens = args.batch_size * args.seq_len
        self.times: list[float] = []

    def tick(self) -> None:
        self.times.append(time.perf_counter())

    def rate(self) -> float:
        return self.tokens * (len(self.times) - 2) / (self.times[-1] - self.times[1])


def ours(args: argparse.Namespace) -> float:
    """A run of our CausalLMModule in Lightning's Trainer."""
    import lightning as L
    import numpy as np

    from genai_pl.data.loader import BatchPlan, EpochLoader
    from genai_pl.models import Decoder, ModelConfig
    from genai_pl.modules import CausalLMModule
    from genai_pl.objectives import CausalLMCollator, SpecialTokens
    from genai_pl.optim import adamw, constant
    from genai_pl.training.library_messages import silence_libraries

    silence_libraries()
    clock = Clock(args)

    class Ticks(L.Callback):
        def on_train_batch_end(self, *_: object) -> None:
            clock.tick()

    sizes = {k: getattr(args, k) for k in ("n_layer", "n_head", "n_embd", "vocab_size")}
    model = Decoder(ModelConfig(**sizes, max_seq_len=args.seq_len))
    if args.compile:
        for block in model.blocks:
            block.compile()
    module = CausalLMModule(
        model,
        vocabulary=SpecialTokens(size=args.vocab_size, n_bytes=np.ones(args.vocab_size, np.int64)),
        seed=0,
        optimizer=lambda named: adamw(named, lr=3e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1),
        schedule=lambda step, total_steps: constant(step, total_steps=total_steps, warmup_steps=0),
    )
    ones = torch.ones(args.seq_len + 1).numpy()
    data = [{"input_ids": row.numpy(), "segment_ids": ones} for row in rows(args, args.batch_size * (args.steps + 2))]
    trainer = L.Trainer(
        max_steps=args.steps + 2, limit_val_batches=0, precision=args.precision, accelerator="cpu", logger=False,
        callbacks=[Ticks()],
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, EpochLoader(data, CausalLMCollator(), BatchPlan(batch_size=args.batch_size)))
    return clock.rate()


def gpt2(args: argparse.Namespace) -> torch.nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {k: getattr(args, k) for k in ("n_layer", "n_head", "n_embd", "vocab_size")}
    return GPT2LMHeadModel(
        GPT2Config(**sizes, n_positions=args.seq_len, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False)
    )


def transformers(args: argparse.Namespace) -> float:
    """A run of transformers' Trainer, as its documentation sets it up."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    clock = Clock(args)

    class Ticks(TrainerCallback):
        def on_step_end(self, *_: object, **__: object) -> None:
            clock.tick()

    data = [{"input_ids": row, "labels": row} for row in rows(args, args.batch_size * (args.steps + 2))[:, :-1]]
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            output_dir=folder, max_steps=args.steps + 2, per_device_train_batch_size=args.batch_size, report_to=[],
            save_strategy="no", logging_strategy="no", disable_tqdm=True, use_cpu=True, max_grad_norm=0.0,
            weight_decay=0.1, learning_rate=3e-4, dataloader_pin_memory=False, bf16=args.precision == "bf16-mixed",
        )  # fmt: skip
        Trainer(model=gpt2(args), args=settings, train_dataset=data, callbacks=[Ticks()]).train()
    return clock.rate()


def loop(args: argparse.Namespace) -> float:
    """The plain loop that tutorials show."""
    model, clock = gpt2(args), Clock(args)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1)
    for batch in rows(args, args.batch_size * (args.steps + 2)).split(args.batch_size):
        with torch.autocast("cpu", torch.bfloat16, enabled=args.precision == "bf16-mixed"):
            logits = model(batch[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        clock.tick()
    return clock.rate()


def main() -> None:
    args = parse()
    if args.side:
        print(json.dumps({"ours": ours, "transformers": transformers, "loop": loop}[args.side](args)))
        return
    print(f"{args.n_layer} layers, {args.n_embd} wide, {args.batch_size} x {args.seq_len} tokens, V={args.vocab_size}")
    ratios = []
    for pair in range(args.pairs):
        mine, theirs = measured("ours"), measured(args.peer)
        ratios.append(mine / theirs)
        print(
            f"pair {pair + 1}: ours {mine:8,.0f} tok/s  {args.peer} {theirs:8,.0f} tok/s  ratio {ratios[-1]:.2f}",
            flush=True,
        )
    print(f"median ratio {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
