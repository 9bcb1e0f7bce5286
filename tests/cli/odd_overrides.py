"""Odd overrides: cases drawn from the composed configurations, and a process that runs each in a fork of itself."""

import importlib
import json
import os
import random
import resource
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
TINY = (
    "model.n_layer=1", "model.n_embd=32", "model.n_head=2", "model.max_seq_len=32", "tokenizer=byte", "data.batch_size=2",
    "trainer.max_steps=2", "trainer.limit_val_batches=1", "trainer.log_every_n_steps=1", "callbacks.samples.every_n_steps=null",
)  # fmt: skip
DATA = {
    "pairs": "pairs.jsonl", "chat": "chat.jsonl", "preference": "preference.jsonl", "unpaired": "unpaired.jsonl",
    "prompts": "prompts.jsonl", "seq2seq": "seq2seq.jsonl", "text": "text.txt", "stepwise": "steps.jsonl",
}  # fmt: skip
OBJECTIVES = {
    "clm": "text", "fim": "text", "prefix_lm": "text", "mlm": "text", "permutation": "text", "span_corruption": "text",
    "contrastive": "pairs", "sft": "chat", "dpo": "preference", "reward": "preference", "kto": "unpaired",
    "grpo": "prompts", "ppo": "prompts", "seq2seq": "seq2seq", "process_reward": "stepwise", "distill": "text",
}  # fmt: skip
MODELS = ("gpt_nano", "encoder_nano", "t5_nano", "bert_nano", "xlnet_nano", "vanilla_nano", "llama", "gemma3")
FITTING = {
    "mlm": "bert_nano", "permutation": "xlnet_nano", "span_corruption": "t5_nano", "seq2seq": "t5_nano",
    "contrastive": "encoder_nano",
}  # fmt: skip
ROLLOUTS = ("objective.reward=rewards.py:length", "objective.max_new_tokens=4", "objective.minibatch_size=2")
NEEDED = {  # what an objective needs beside its data
    "grpo": ROLLOUTS, "ppo": ROLLOUTS,
    "distill": ("objective.teacher=base", "objective.max_new_tokens=4", "objective.text_prompt_tokens=8"),
}  # fmt: skip
BESIDE = {
    "distill": ("teacher=base", "data.path=text.txt", "data.seq_len=16", "data.batch_size=8", "top_k=4"),
    "generate": ("checkpoint=base", "prompt=ab", "generation.max_new_tokens=2"),
    "evaluate": ("checkpoint=base", "data.path=text.txt", "limit=2"),
    "export": ("checkpoint=base", "out=exported"),
    "feedback": ("checkpoint=base", "data.path=prompts.jsonl", "limit=2", "generation.max_new_tokens=2"),
    "serve": ("checkpoint=base", "port=0"),
}
ODD = (
    "null", "0", "-1", "1e38", "nan", "inf", "''", "[]", "{}", "true", "false", "wrong", "999999999999999999999", "no/where",
    "0.5", "3", "-0.5", "1e-300", "[1,2]", "{a:1}", "[null]", "[[a]]", "'a b'", "2147483647",
)  # fmt: skip
CHOICES = {  # of groups, and in every how many cases one is chosen
    "peft": (("lora", "dora", "ia3", "prefix", "prompt", "bottleneck", "bitfit"), 5),
    "optimizer": (("adafactor", "adam", "adamw", "sgd"), 4),
    "scheduler": (("constant", "cosine", "inverse_sqrt", "step", "wsd"), 7),
}
ENDLESS = ("trainer.max_steps", "trainer.max_epochs", "workers", "retries")  # of these only what is no work for hours
SECONDS, BYTES = 60, 12 * 2**30


class Case(NamedTuple):
    """A command, and what follows it."""

    command: str
    arguments: tuple[str, ...]


class Outcome(NamedTuple):
    """How a command ended: its exit status, or minus the signal that ended it, and what it wrote."""

    status: int
    out: str
    err: str


def draw(seed: int, n: int) -> list[Case]:
    """n cases: a command that works, with one or two values that are odd."""
    rng, cases = random.Random(seed), []
    for number in range(n):
        command, arguments = _usual(rng, number)
        fields = list(_fields(command, arguments))
        odd = [f"{rng.choice(fields)}={rng.choice(ODD)}" for _ in range(rng.choice((1, 1, 2)))]
        odd = [o for o in odd if not (o.startswith(ENDLESS) and o.partition("=")[2][:1] in "1392t")]
        cases.append(Case(command, (*arguments, *odd)))
    return cases


def sizes(model: str) -> tuple[str, ...]:
    """What makes a model small."""
    further = {
        "t5_nano": ("model.n_decoder_layer=1",),
        "vanilla_nano": ("model.n_decoder_layer=1",),
        "llama": ("model.n_kv_head=1", "model.intermediate_size=64"),
        "gemma3": ("model.n_kv_head=1", "model.intermediate_size=64", "model.head_dim=16"),
    }
    return (*TINY, *further.get(model, ()))


def needed(objective: str) -> tuple[str, ...]:
    """What an objective needs beside its data."""
    return NEEDED.get(objective, ())


def _usual(rng: random.Random, number: int) -> Case:
    """The command without anything odd, but for objectives of models and data that do not fit; train.py twice in three."""
    if number % 3 == 2:
        command = rng.choice(sorted(BESIDE))
        return Case(command, BESIDE[command])
    objective = rng.choice(sorted(OBJECTIVES))
    fits = rng.random() < 0.8
    model = FITTING.get(objective, "gpt_nano") if fits else rng.choice(MODELS)
    data = OBJECTIVES[objective] if fits or rng.random() < 0.5 else rng.choice(sorted(DATA))
    arguments = [f"model={model}", f"objective={objective}", f"data={data}", f"data.path={DATA[data]}", *sizes(model)]
    arguments += needed(objective)
    for group, (choices, every) in CHOICES.items():
        arguments += [f"{group}={rng.choice(choices)}"] if number % every == 0 else []
    return Case("train", (*arguments, "hydra.run.dir=run"))


def _fields(command: str, arguments: tuple[str, ...]) -> Iterator[str]:
    """The dotted names of everything that a command line may set, nodes too."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    from genai_pl.cli.command import CONF, register
    from genai_pl.training.config_errors import _option_names

    register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose(
            "config" if command == "train" else command, overrides=[g for g in arguments if "hydra" not in g]
        )
    yield from (path for path in _option_names(config) if not path.rpartition(".")[2].startswith("_"))


def write_files(folder: Path) -> None:
    """Small data of every kind, and a reward."""
    rows = {
        "pairs": {"anchor": "a {}", "positive": "b {}"},
        "chat": {"prompt": "{} and", "completion": "so on"},
        "preference": {"prompt": "{} is", "chosen": "good", "rejected": "bad"},
        "prompts": {"prompt": "{} is"},
        "seq2seq": {"source": "a {}", "target": "b {}"},
    }
    for name, row in rows.items():
        lines = [json.dumps({key: value.format(n) for key, value in row.items()}) for n in range(24)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    lines = [json.dumps({"prompt": f"{n} is", "completion": "good", "label": n % 2 == 0}) for n in range(24)]
    (folder / "unpaired.jsonl").write_text("\n".join(lines) + "\n")
    steps = ({"prompt": f"{n} is", "completions": ["a", "b"], "labels": [True, n % 2 == 0]} for n in range(24))
    (folder / "steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in steps))
    (folder / "text.txt").write_text("\n\n".join(f"The {n} of it, and what follows." for n in range(60)))
    (folder / "rewards.py").write_text(
        "def length(prompts, completions, **columns):\n    return [float(len(text)) for text in completions]\n"
    )


def run(case: Case, folder: Path, name: str) -> Outcome:
    """How the case ends in a folder of its own beside the data, in a fork of this process."""
    place = folder / name
    place.mkdir()
    for path in folder.iterdir():
        if path.suffix or path.name == "base":
            (place / path.name).symlink_to(path)
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        _child(case, place)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    texts = [(place / stream).read_text(errors="replace") for stream in ("stdout", "stderr")]
    return Outcome(status, *texts)


def _child(case: Case, place: Path) -> None:
    """Run the command as a user would; does not return."""
    import traceback

    os.chdir(place)
    for stream, number in (("stdout", 1), ("stderr", 2)):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_CREAT), number)
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(SECONDS)
    sys.argv = [f"{case.command}.py", *case.arguments]
    sys.stdin = open(os.devnull)  # noqa: SIM115
    status = 0
    try:
        _stop_servers()
        importlib.import_module(case.command).main()
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except BaseException:
        traceback.print_exc()
        status = 99
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _stop_servers() -> None:
    """Let a server end once it is ready."""
    import uvicorn
    from uvicorn.supervisors import Multiprocess

    uvicorn.Server.run = lambda self, sockets=None: None
    Multiprocess.run = lambda self: setattr(self, "processes", [])


def main() -> None:
    """Run cases, a JSON list on stdin, in the folder that is named; a JSON line on stdout for each."""
    folder = Path(sys.argv[1])
    sys.path.insert(0, str(ROOT))
    write_files(folder)
    for module in (
        "genai_pl.training.train",
        "genai_pl.cli.generate",
        "genai_pl.cli.evaluate",
        "genai_pl.cli.feedback",
        "uvicorn",
    ):
        importlib.import_module(module)
    base = Case("train", ("data.path=text.txt", *TINY, "hydra.run.dir=../base"))
    print(json.dumps(run(base, folder, "making_base")), flush=True)
    for number, case in enumerate(json.load(sys.stdin)):
        print(json.dumps(run(Case(case[0], tuple(case[1])), folder, f"case_{number}")), flush=True)


if __name__ == "__main__":
    main()
