"""PPO with LoRA against TRL's PPOTrainer: python benchmarks/ppo_speed.py MODEL PROMPTS.jsonl [--peer-python PATH]

Both sides write a fixed number of tokens after each prompt, let a reward model of the policy's size judge them, and learn from
a rollout in four passes of minibatches, in float32 with AdamW. Ours is a LoRA policy whose base is also the reference and,
with a reward adapter of zeros, the judge, and a value head on the policy; TRL has a LoRA policy, and a reward and a value
model of their own. The figure is completions per second after the first rollout and peak memory, in turns, each side in a
process of its own; --peer-python is one that has trl 0.24, the last release with PPO outside its experiments, and peft.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from rollouts import fit_prompts, learner, prompts
from sides import PEFT, figures, in_turns, ticks, trl_settings

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


def ours(args: argparse.Namespace) -> dict[str, float]:
    """A run of our PPOModule in Lightning's Trainer."""
    import torch

    from genai_pl.config.enums import Head
    from genai_pl.loading import load
    from genai_pl.modules.ppo import PPOModule
    from genai_pl.peft import lora, save_adapter
    from genai_pl.training.library_messages import silence_libraries
    from genai_pl.training.rewards import load_rewards

    silence_libraries()
    options = {"epochs": PASSES, "minibatch_size": args.minibatch, "max_new_tokens": args.new}
    module, tokenizer = learner(PPOModule, "ppo", args.model, **options)
    updates = PASSES * -(-args.batch // args.minibatch) * (args.rollouts + 1)
    with tempfile.TemporaryDirectory() as folder:
        judge = load(args.model).model
        judge.set_head(Head.score)
        save_adapter(lora(judge), Path(folder, "judge"), base=args.model)
        reward = load_rewards([f"{folder}/judge"], None, policy=module.model, device=torch.device("cpu"))
        module.use_reward(reward, decode=tokenizer.decode)
    given = {"batch": args.batch, "prompt_len": args.prompt_len, "new": args.new, "updates": updates}
    times = fit_prompts(module, tokenizer, prompts(args.data, args.batch * (args.rollouts + 1)), **given)
    return figures(times, args.batch * (len(times) - 1))


def trl(args: argparse.Namespace) -> dict[str, float]:
    """A run of TRL's PPOTrainer."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl import PPOConfig, PPOTrainer

    times: list[float] = []
    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    scoring = {"num_labels": 1, "dtype": torch.float32, "pad_token_id": tokenizer.pad_token_id}
    texts = prompts(args.data, args.batch * (args.rollouts + 1))
    ids = [{"input_ids": tokenizer(text)["input_ids"][-args.prompt_len :]} for text in texts]
    with tempfile.TemporaryDirectory() as folder:
        settings = PPOConfig(
            per_device_train_batch_size=args.batch, gradient_accumulation_steps=1,
            num_mini_batches=args.batch // args.minibatch, total_episodes=args.batch * (args.rollouts + 1),
            num_ppo_epochs=PASSES, local_rollout_forward_batch_size=args.batch, response_length=args.new,
            num_sample_generations=0, temperature=1.0, learning_rate=1e-6, **trl_settings(folder),
        )  # fmt: skip
        PPOTrainer(
            args=settings, processing_class=tokenizer, ref_model=None, train_dataset=Dataset.from_list(ids),
            eval_dataset=Dataset.from_list(ids[:1]), callbacks=[ticks(times)],
            model=AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32),
            reward_model=AutoModelForSequenceClassification.from_pretrained(args.model, **scoring),
            value_model=AutoModelForSequenceClassification.from_pretrained(args.model, **scoring),
            peft_config=LoraConfig(**PEFT),
        ).train()  # fmt: skip
    return figures(times, args.batch * (len(times) - 1))


def main() -> None:
    args = parse()
    sides = {"ours": lambda: ours(args), "trl": lambda: trl(args)}
    in_turns(sides, args.side, "completions", turns=args.turns, python=args.peer_python)


if __name__ == "__main__":
    main()
