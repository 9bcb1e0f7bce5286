"""PPO with LoRA against TRL's PPOTrainer: python benchmarks/ppo_speed.py MODEL PROMPTS.jsonl [--peer-python PATH]

Both sides write a fixed number of tokens after each prompt, let a reward model of the policy's size judge them, and learn from
a rollout in four passes of minibatches, in float32 with AdamW. Ours is a LoRA policy whose base is also the reference and,
with a reward adapter of zeros, the judge, and a value head on the policy; TRL has a LoRA policy, and a reward and a value
model of their own. The figure is completions per second after the first rollout and peak memory, in turns, each side in a
process of its own; --peer-python is one that has trl 0.24, the last release with PPO outside its experiments, and peft.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from sides import figures, measured

PASSES = 4


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a Hugging Face folder of the Llama kind")
    parser.add_argument("data", help="lines of JSON with prompt")
    parser.add_argument("--batch", type=int, default=8, help="completions of a rollout")
    parser.add_argument("--minibatch", type=int, default=4)
    parser.add_argument("--prompt-len", type=int, default=32, help="tokens; longer prompts are cut on the left")
    parser.add_argument("--new", type=int, default=32, help="tokens of a completion")
    parser.add_argument("--rollouts", type=int, default=3)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--side", choices=("ours", "trl"), help=argparse.SUPPRESS)
    return parser.parse_args()


def prompts(args: argparse.Namespace) -> list[str]:
    """As many as the rollouts take."""
    with open(args.data, encoding="utf-8") as file:
        return [
            json.loads(line)["prompt"] for _, line in zip(range(args.batch * (args.rollouts + 1)), file, strict=False)
        ]


def ours(args: argparse.Namespace) -> dict[str, float]:
    """A run of our PPOModule in Lightning's Trainer."""
    import lightning as L
    import torch
    from omegaconf import OmegaConf

    from genai_pl.data import vocabulary
    from genai_pl.data.preferences import PromptsDataModule
    from genai_pl.loading import load
    from genai_pl.modules.ppo import PPOModule
    from genai_pl.names import Head
    from genai_pl.optim import adamw, constant
    from genai_pl.peft import lora, save_adapter
    from genai_pl.rewards import load_rewards
    from genai_pl.run import quiet

    quiet()
    times: list[float] = []

    class Ticks(L.Callback):
        def on_train_batch_end(self, *_: object) -> None:
            times.append(time.perf_counter())

    torch.manual_seed(0)
    model, tokenizer, _ = load(args.model)
    with tempfile.TemporaryDirectory() as folder:
        judge = load(args.model).model
        judge.set_head(Head.score)
        save_adapter(lora(judge), Path(folder, "judge"), base=args.model)
        with open(f"{folder}/prompts.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps({"prompt": text}) + "\n" for text in [*prompts(args), "held"])
        options = OmegaConf.to_container(OmegaConf.load(Path(__file__).parent.parent / "conf/objective/ppo.yaml"))
        options = {name: value for name, value in options.items() if name != "defaults" and not name.startswith("_")}
        options |= {"epochs": PASSES, "minibatch_size": args.minibatch, "max_new_tokens": args.new}
        module = PPOModule(
            lora(model.train()), vocabulary=vocabulary(tokenizer, model.config.vocab_size), seed=0,
            optimizer=lambda named: adamw(named, lr=1e-6, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0),
            schedule=lambda step, total_steps: constant(step, total_steps=total_steps, warmup_steps=0), **options,
        )  # fmt: skip
        module.reward = load_rewards([f"{folder}/judge"], None, policy=module.model, device=torch.device("cpu"))
        module.decode = tokenizer.decode
        data = PromptsDataModule(
            path=f"{folder}/prompts.jsonl", val_path=None, val_fraction=1e-9, prompt="prompt",
            max_prompt_len=args.prompt_len, batch_size=args.batch, val_batch_size=None, workers=0, shuffle=False, seed=0,
            seq_len=args.prompt_len + args.new,
        )  # fmt: skip
        data.prepare(tokenizer, module.collator)
        updates = PASSES * -(-args.batch // args.minibatch)
        L.Trainer(
            max_steps=updates * (args.rollouts + 1), limit_val_batches=0, accelerator="cpu", logger=False,
            callbacks=[Ticks()], enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        ).fit(module, data)  # fmt: skip
    return figures(times, args.batch * (len(times) - 1))


def trl(args: argparse.Namespace) -> dict[str, float]:
    """A run of TRL's PPOTrainer."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
    from trl import PPOConfig, PPOTrainer

    times: list[float] = []

    class Ticks(TrainerCallback):
        def on_step_end(self, *_: object, **__: object) -> None:
            times.append(time.perf_counter())

    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    scoring = {"num_labels": 1, "dtype": torch.float32, "pad_token_id": tokenizer.pad_token_id}
    ids = [{"input_ids": tokenizer(text)["input_ids"][-args.prompt_len :]} for text in prompts(args)]
    with tempfile.TemporaryDirectory() as folder:
        settings = PPOConfig(
            output_dir=folder, per_device_train_batch_size=args.batch, gradient_accumulation_steps=1,
            num_mini_batches=args.batch // args.minibatch, total_episodes=args.batch * (args.rollouts + 1),
            num_ppo_epochs=PASSES, local_rollout_forward_batch_size=args.batch, response_length=args.new,
            num_sample_generations=0, temperature=1.0, learning_rate=1e-6, report_to=[], save_strategy="no",
            logging_strategy="no", disable_tqdm=True, use_cpu=True, bf16=False, dataloader_pin_memory=False,
            gradient_checkpointing=False,
        )  # fmt: skip
        targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
        PPOTrainer(
            args=settings, processing_class=tokenizer, ref_model=None, train_dataset=Dataset.from_list(ids),
            eval_dataset=Dataset.from_list(ids[:1]), callbacks=[Ticks()],
            model=AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32),
            reward_model=AutoModelForSequenceClassification.from_pretrained(args.model, **scoring),
            value_model=AutoModelForSequenceClassification.from_pretrained(args.model, **scoring),
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
            f"turn {turn}: ours {mine['rate']:.2f} completions/s, {mine['gib']:.2f} GiB   trl {theirs['rate']:.2f}, "
            f"{theirs['gib']:.2f} GiB   ratio {ratios[-1]:.2f}, memory {mine['gib'] / theirs['gib']:.2f}",
            flush=True,
        )
    print(f"median ratio {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
