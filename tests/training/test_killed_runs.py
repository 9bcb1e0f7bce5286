"""Runs that SIGKILL ends at any moment: taken up again, once or more, they are the run that nobody disturbed, to the last bit."""

import csv
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from genai_pl.checkpoints.file import read_checkpoint
from tests.calling_models import write_untrained
from tests.training.forked_runs import TORN, Moment
from tests.training.killing import Killer

NEW = (
    *("model.n_layer=1", "model.n_embd=32", "model.n_head=2", "model.max_seq_len=48", "model.dropout=0.1"),
    "tokenizer=byte",
)
SMALL = (
    *("data.batch_size=2", "optimizer=adamw", "scheduler.warmup_steps=2", "trainer.max_steps=7"),
    *("trainer.val_check_interval=2", "trainer.limit_val_batches=1", "trainer.log_every_n_steps=1", "logger=csv"),
    *("callbacks.samples.every_n_steps=null", "callbacks.checkpoint.every_n_steps=2"),
)
TWO = ("trainer.devices=2", "trainer.accelerator=cpu")
DDP, FSDP = ("trainer=ddp", *TWO), ("trainer=fsdp", *TWO)
PIECES = ("strategy.sharded_checkpoints=true",)
TEXT, CHAT, PAIRS = (f"data.path=../{name}" for name in ("text.txt", "examples.jsonl", "pairs.jsonl"))
PROMPTS = ("data.path=../prompts.jsonl", "objective.reward=../rewards.py:many_e", "objective.max_new_tokens=8")
STREAM = ("data.path=../documents.jsonl", "data.streaming=true", "data.val_path=../text.txt", "data.block_rows=5")
MIXTURE = (
    "data.sources={file: {path: ../text.txt, weight: 3}, "
    "stream: {path: ../documents.jsonl, streaming: true, block_rows: 5, val_documents: 10, weight: [[0, 1], [1, 3]]}, "
    "talks: {path: ../examples.jsonl, kind: chat, weight: 2, epochs: 1}}",
    "precision=fp32",
)
SFT, DPO = ("objective=sft", CHAT), ("objective=dpo", PAIRS)
GRPO = ("objective=grpo", *PROMPTS, "objective.group_size=4")
PPO = ("objective=ppo", *PROMPTS, "objective.epochs=2", "objective.minibatch_size=2", "objective.kl_target=1.0")
CALLER = "init_from=../caller"  # a model that calls a tool
CALCULATOR = (
    *(
        "objective=grpo",
        CALLER,
        "data.path=../sums.jsonl",
        "objective.environment=calculator",
        "objective.group_size=4",
    ),
    *("objective.max_turns=2", "objective.max_new_tokens=100", "precision=fp32"),
)
ON_POLICY = (
    *("objective=distill", "objective.teacher=../caller", CALLER, "init_layers=1", TEXT, "data.seq_len=48"),
    *("objective.student_fraction=0.5", "objective.max_new_tokens=8", "objective.text_prompt_tokens=8"),
    *("objective.beta=0.5", "precision=fp32"),
)
BEST = (
    *("callbacks.checkpoint.best=val/loss", "callbacks.export=best", "callbacks.checkpoint.keep=1"),
    *("callbacks.early_stopping.patience=2", "callbacks.early_stopping.min_delta=10", "optimizer.lr=0.1"),
)
KINDS = {
    "bpe": (TEXT, "tokenizer=bpe", "tokenizer.vocab_size=300"),
    "tensorboard": (TEXT, "logger=default", "callbacks.samples.every_n_steps=3", "optimizer=muon"),
    "accumulate": (TEXT, "trainer.accumulate_grad_batches=3", "trainer.log_every_n_steps=3", "callbacks=ema"),
    "stream": STREAM,
    "workers": (TEXT, "data.workers=1", "peft=lora"),
    "sft": (*SFT, "tokenizer=bpe", "tokenizer.vocab_size=280"),
    "dpo": DPO,
    "precomputed": (*DPO, "objective.precompute_reference=true"),
    "grpo": GRPO,
    "ppo": PPO,
    "bpe-ddp": (TEXT, *DDP, "tokenizer=bpe", "tokenizer.vocab_size=300"),
    "fsdp": (TEXT, *FSDP),
    "pieces": (TEXT, *FSDP, *PIECES),
    "stream-ddp": (*STREAM, *DDP),
    "sft-fsdp": (*SFT, *FSDP),
    "dpo-ddp": (*DPO, *DDP),
    "grpo-ddp": (*GRPO, *DDP),
    "ppo-ddp": (*PPO, *DDP),
    "mixture": (*MIXTURE, "data.workers=2", "trainer.accumulate_grad_batches=2"),
    "mixture-ddp": (*MIXTURE, *DDP),
    "best": (TEXT, *BEST),
    "best-pieces": (TEXT, *BEST, *FSDP, *PIECES),
    "calculator": CALCULATOR,
    "calculator-ddp": (*CALCULATOR, *DDP),
    "curriculum": (*GRPO, "objective.curriculum=0.5", "objective.pass_score=0.1", "objective.dynamic_sampling=2"),
    "on-policy": ON_POLICY,
    "on-policy-ddp": (*ON_POLICY, *DDP),
}
TIMES = {"train/tokens_per_sec", "train/data_wait", "train/mfu", "train/memory_gib", "train/rollout_seconds"}
REWARD = """
def many_e(prompts, completions, **columns):
    return [completion.count("e") / 10 for completion in completions]
"""


class Case(NamedTuple):
    """A kind of run, the stages in which it is killed one after the other, how far in each, and the ranks."""

    kind: str
    stages: tuple[str, ...]
    shares: tuple[float, ...]
    ranks: tuple[int, ...]

    def __str__(self) -> str:
        return "-".join(
            (self.kind, *(f"{stage}{share:.3f}" for stage, share in zip(self.stages, self.shares, strict=True)))
        )


OPTIONS = {
    kind: (*SMALL, *(() if CALLER in own else NEW), *own)
    for kind, own in {**KINDS, "quick": (*KINDS["bpe"], "trainer.val_check_interval=5")}.items()
}


def draws() -> list[Case]:
    """Cases of all kinds in which the stages take turns; `time` is a share of the seconds that the run takes."""
    draw = random.Random(18)
    numbers = []
    for kind, options in KINDS.items():
        stages = ["preparation", "training", "validation", "checkpoint", "export", TORN, "time", "beginning", "finish"]
        rolls_out = bool({"objective.group_size=4", "objective.student_fraction=0.5"} & {*options})
        stages += ["rollout"] * rolls_out + ["samples"] * (kind == "tensorboard")
        draw.shuffle(stages)
        ranks = range(2 if TWO[0] in options else 1)
        for length in (1, 1, 3):
            chosen = tuple(stages.pop() for _ in range(length))
            numbers.append(
                Case(kind, chosen, tuple(draw.random() for _ in chosen), tuple(draw.choice(ranks) for _ in chosen))
            )
    return numbers


CASES = draws()


@pytest.fixture(scope="module")
def killer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Killer]:
    folder = tmp_path_factory.mktemp("killed")
    (folder / "text.txt").write_text(" ".join(f"word{i} is {i * i}." for i in range(200)))
    write(
        folder / "documents.jsonl", [{"text": " ".join(f"{i} and {j}." for j in range(i % 9 + 1))} for i in range(60)]
    )
    write(folder / "examples.jsonl", [{"prompt": f"{i} and {i} is ", "completion": str(2 * i)} for i in range(60)])
    write(folder / "pairs.jsonl", [{"prompt": f"{i} is", "chosen": " good", "rejected": " bad"} for i in range(40)])
    write(folder / "prompts.jsonl", [{"prompt": f"{i} is "} for i in range(40)])
    (folder / "rewards.py").write_text(REWARD)
    killer = Killer(folder)
    yield killer
    killer.close()


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


class Whole(NamedTuple):
    """A run that nobody kills."""

    folder: Path
    counts: dict[int, dict[str, int]]
    seconds: float


@pytest.fixture(scope="module")
def whole(killer: Killer) -> Callable[[str], Whole]:
    done: dict[str, Whole] = {}

    def get(kind: str) -> Whole:
        if kind not in done:
            folder = killer.folder / kind
            if CALLER in OPTIONS[kind] and not (killer.folder / "caller").exists():
                learned = killer.run(killer.folder, *write_untrained(killer.folder), "hydra.run.dir=caller")
                assert learned.status == 0, learned.out
            ended = killer.run(folder, *OPTIONS[kind], "hydra.run.dir=run", counts=True)
            assert ended.status == 0, ended.out
            done[kind] = Whole(folder, ended.counts, ended.seconds)
        return done[kind]

    return get


# where it is easily wrong: half a file, a checkpoint that is whole and not yet the last one, half an export
QUICK = Case("quick", ("checkpoint", TORN, "export"), (0.6, 0.25, 0.5), (0, 0, 0))


@pytest.mark.parametrize(
    "case", [pytest.param(QUICK, id="quick"), *(pytest.param(c, id=str(c), marks=pytest.mark.slow) for c in CASES)]
)
def test_a_killed_run_that_is_taken_up_is_the_undisturbed_one(case: Case, killer: Killer, whole) -> None:
    assert_survives(case, killer, whole(case.kind))


def assert_survives(case: Case, killer: Killer, expected: Whole) -> None:
    """The run is killed at each moment of the case, taken up in between and at last, and then equals the expected one."""
    folder, arguments = killer.folder / f"{case}", (*OPTIONS[case.kind], "resume=auto", "hydra.run.dir=run")
    for stage, share, rank in zip(case.stages, case.shares, case.ranks, strict=True):
        if stage == "time":
            when = {"seconds": share * expected.seconds, "rank": rank}
        else:
            rank = rank if stage in expected.counts[rank] else 0  # what one process does for all
            when = {"moment": Moment(stage, 1 + int(share * expected.counts[rank][stage]), rank)}
        ended = killer.run(folder, *arguments, **when)
        print(f"{case}: {when} ended with {ended.status} after {ended.seconds:.1f} s")
        assert ("Traceback" in ended.out, ended.left) == (False, 0), ended.out
    ended = killer.run(folder, *arguments)
    assert (ended.status, "Traceback" in ended.out, ended.left) == (0, False, 0), ended.out
    assert_equal_runs(folder, expected.folder)


def assert_equal_runs(folder: Path, expected: Path) -> None:
    """Table, results, exported files, names of files and everything in the last checkpoint are the same."""
    assert names(folder) == names(expected)
    assert table(folder / "run") == table(expected / "run")
    for path in (
        "results.json",
        *(p for name in ("model", "adapter", "base") for p in (expected / "run" / name).rglob("*")),
    ):
        theirs = expected / "run" / path
        ours = folder / theirs.relative_to(expected)
        if theirs.suffix == ".safetensors":  # which has its metadata in any order
            assert_equal_values(load_file(ours), load_file(theirs), path)
        else:
            assert ours.read_text() == theirs.read_text().replace(str(expected), str(folder)), path
    last = Path("run", "checkpoints", "last.ckpt")
    ours, theirs = (read_checkpoint(path / last) for path in (folder, expected))
    assert_equal_values(ours, theirs, "checkpoint")


def assert_equal_values(ours: object, theirs: object, where: str) -> None:
    assert type(ours) is type(theirs), where
    if isinstance(theirs, torch.Tensor):
        assert torch.equal(ours, theirs), where
    elif isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), where
        for key in theirs:
            if key not in ("saved", "base") and "progress" not in str(key):  # when, where; Lightning's counts of starts
                assert_equal_values(ours[key], theirs[key], f"{where}.{key}")
    elif isinstance(theirs, list | tuple):
        assert len(ours) == len(theirs), where
        for n, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert_equal_values(a, b, f"{where}.{n}")
    else:
        assert ours == theirs, where


def names(folder: Path) -> list[str]:
    """The files of a folder, but for events, of which each process writes a file, and what `datasets` locks."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if not path.name.startswith("events.out.tfevents"))
    return sorted(str(path) for path in paths if not (path.parts[0] == "cache" and path.suffix == ".lock"))


def table(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as file:
        return [{name: value for name, value in row.items() if name not in TIMES} for row in csv.DictReader(file)]
