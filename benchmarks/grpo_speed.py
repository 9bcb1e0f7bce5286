"""GRPO with LoRA against TRL's GRPOTrainer: python benchmarks/grpo_speed.py MODEL PROMPTS.jsonl [--peer-python PATH]

Both sides draw the same number of completions of each prompt, reward letters, and take one step on them, in float32 with
AdamW and the base without its adapter as the reference. The figure is completions per second after the first step and peak
memory, in turns, each side in a process of its own; --peer-python is one that has trl 1.16 and peft.
"""

import argparse
import sys
import tempfile

from rollouts import fit_prompts, learner, prompts
from sides import PEFT, figures, in_turns, ticks, trl_settings


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a Hugging Face folder of the Llama kind")
    parser.add_argument("data", help="lines of JSON with prompt")
    parser.add_argument("--batch", type=int, default=4, help="prompts of a step")
    parser.add_argument("--group", type=int, default=8, help="completions of a prompt")
    parser.add_argument("--prompt-len", type=int, default=128, help="tokens; longer prompts are cut on the left")
    parser.add_argument("--new", type=int, default=32, help="tokens of a completion at most")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--side", choices=("ours", "trl"), help=argparse.SUPPRESS)
    return parser.parse_args()


def letters(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
    """How often each completion says e."""
    return [float(said.count("e")) for said in completions]


def ours(args: argparse.Namespace) -> dict[str, float]:
    """A run of our GRPOModule in Lightning's Trainer."""
    from genai_pl.modules.grpo import GRPOModule
    from genai_pl.training.library_messages import silence_libraries

    silence_libraries()
    options = {"group_size": args.group, "max_new_tokens": args.new}
    module, tokenizer = learner(GRPOModule, "grpo", args.model, **options)
    module.use_reward(lambda prompts, completions, _, **columns: letters(prompts, completions), decode=tokenizer.decode)
    given = {"batch": args.batch, "prompt_len": args.prompt_len, "new": args.new, "updates": args.steps + 1}
    times = fit_prompts(module, tokenizer, prompts(args.data, args.batch * (args.steps + 1)), **given)
    return figures(times, args.batch * args.group * (len(times) - 1))


def trl(args: argparse.Namespace) -> dict[str, float]:
    """A run of TRL's GRPOTrainer."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    times: list[float] = []
    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    texts = prompts(args.data, args.batch * (args.steps + 1))
    cut = [tokenizer.decode(tokenizer(text)["input_ids"][-args.prompt_len :]) for text in texts]
    with tempfile.TemporaryDirectory() as folder:
        settings = GRPOConfig(
            max_steps=args.steps + 1, per_device_train_batch_size=args.batch * args.group, num_generations=args.group,
            gradient_accumulation_steps=1, max_completion_length=args.new, beta=0.04, temperature=1.0, learning_rate=1e-6,
            shuffle_dataset=False, **trl_settings(folder),
        )  # fmt: skip
        GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32), args=settings,
            reward_funcs=letters, train_dataset=Dataset.from_list([{"prompt": text} for text in cut]),
            processing_class=tokenizer, callbacks=[ticks(times)],
            peft_config=LoraConfig(**PEFT),
        ).train()  # fmt: skip
    return figures(times, args.batch * args.group * (len(times) - 1))


def main() -> None:
    args = parse()
    sides = {"ours": lambda: ours(args), "trl": lambda: trl(args)}
    in_turns(sides, args.side, "completions", turns=args.turns, python=args.peer_python)


if __name__ == "__main__":
    main()
