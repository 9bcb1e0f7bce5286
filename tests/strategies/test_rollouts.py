"""Rollouts on two processes: policies that generate in training, references and critics beside them."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from tests.calling_models import write_untrained
from tests.strategies.processes import (
    MODEL,
    assert_equal_to_the_last_bit,
    assert_same,
    processes,
    start,
    table,
    train,
    wait_for_step,
)

LLAMA = (
    "model=llama",
    "model.n_layer=2",
    "model.n_embd=32",
    "model.n_head=4",
    "model.n_kv_head=2",
    "model.intermediate_size=64",
    "model.max_seq_len=48",
    "tokenizer=byte",
    "scheduler=constant",
    "scheduler.warmup_steps=0",
    "trainer.log_every_n_steps=1",
    "callbacks.samples.every_n_steps=null",
    "logger=csv",
)
# seven rows are held: four for one process and three for the other
SMALL = (*LLAMA, "optimizer=sgd", "optimizer.lr=0.02", "data.val_path=held.jsonl", "data.val_batch_size=1")
ADAPTER = "adapter/adapter_model.safetensors"
HALF, WHOLE = "data.batch_size=2", "data.batch_size=4"
DDP, FSDP = ("trainer=ddp", "trainer.devices=2"), ("trainer=fsdp", "trainer.devices=2")
PPO = (
    "objective=ppo", "data.path=prompts.jsonl", "objective.reward=letters:vowels", "objective.max_new_tokens=16",
    "objective.epochs=2", "objective.minibatch_size=null", "objective.kl_target=1.0", "trainer.max_steps=8",
)  # fmt: skip
GRPO = (
    "objective=grpo", "objective.group_size=4", "data.path=prompts.jsonl", "objective.reward=letters:vowels",
    "objective.max_new_tokens=16", "objective.epochs=2", "objective.minibatch_size=4", "trainer.max_steps=8",
)  # fmt: skip
SAME = (
    "objective/scores", "objective/kl", "objective/entropy", "objective/response_length", "policy/ratio",
    "train/grad_norm", "val/scores", "val/kl", "val/response_length", "val/ended",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts, and a model whose answers to them end after unequal numbers of tokens."""
    path = tmp_path_factory.mktemp("rollouts")
    answers = (" yes", " no", " it is the question")

    def write(name: str, rows: list[dict]) -> None:
        (path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    rows = [{"prompt": f"{n} is", "completion": answers[n % 3], "chosen": " yes", "rejected": " no"} for n in range(32)]
    write("chat.jsonl", [{name: row[name] for name in ("prompt", "completion")} for row in rows])
    write("pairs.jsonl", [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows])
    write("prompts.jsonl", [{"prompt": row["prompt"]} for row in rows[7:]])
    write("held.jsonl", [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows[:7]])
    (path / "letters.py").write_text(
        "def vowels(prompts, completions, **columns):\n"
        "    return [sum(said.count(letter) for letter in 'aeiou') + len(said) / 9 for said in completions]\n"
        "def odd(prompts, completions, **columns):\n"
        "    return [float(len(said) % 2) for said in completions]\n"
    )
    tune = ("objective=sft", "data.path=chat.jsonl", "optimizer=adamw", "optimizer.lr=1e-2", "trainer.max_steps=40")
    train(path, *LLAMA, *tune, "data.batch_size=4", "hydra.run.dir=base")
    return path


@pytest.fixture(scope="module")
def judge(folder: Path) -> str:
    """A reward model in the folder `judge`."""
    options = ("objective=reward", "init_from=base/model", "data.path=pairs.jsonl", "trainer.max_steps=8")
    train(folder, *SMALL, *options, "data.batch_size=4", "hydra.run.dir=judge")
    return "judge"


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["ppo", "reinforce"])  # both whiten over the tokens of all processes
def test_two_processes_take_the_steps_of_one_on_what_greedy_decoding_writes(objective: str, folder: Path) -> None:
    greedy = (*SMALL, *PPO, "init_from=base/model", "objective.temperature=0")
    if objective == "reinforce":
        greedy = (
            "objective=reinforce",
            *(option for option in greedy if "objective=" not in option and "kl_" not in option),
        )
    train(folder, *greedy, WHOLE, f"hydra.run.dir={objective}-one")
    train(folder, *greedy, HALF, *FSDP, f"hydra.run.dir={objective}-two")
    names = (*SAME, "loss/value") if objective == "ppo" else SAME
    assert_same(folder / f"{objective}-two", folder / f"{objective}-one", names=names, rounding=1e-5)


@pytest.mark.slow
def test_copies_of_the_model_take_them_too(folder: Path) -> None:
    greedy = (*SMALL, *PPO, "init_from=base/model", "objective.temperature=0")
    for name, options in {"one more": (WHOLE,), "ddp": (HALF, *DDP)}.items():
        train(folder, *greedy, *options, f"hydra.run.dir='{name}'")
    assert_same(folder / "ddp", folder / "one more", names=(*SAME, "loss/value"), rounding=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["ppo", "reinforce"])  # which compares the episodes of all questions
def test_two_processes_play_and_learn_what_one_does_with_a_tool(objective: str, tmp_path: Path) -> None:
    train(tmp_path, *write_untrained(tmp_path), "hydra.run.dir=caller")
    options = (
        f"objective={objective}", "init_from=caller", "data.path=sums.jsonl", "objective.environment=calculator",
        "objective.max_turns=2", "objective.max_new_tokens=100", "objective.temperature=0", "data.val_path=sums.jsonl",
        "objective.epochs=1", "objective.minibatch_size=null",
        "trainer.max_steps=4", "trainer.limit_val_batches=2", "data.val_batch_size=1", "optimizer=sgd", "optimizer.lr=0.1",
        "scheduler=constant", "scheduler.warmup_steps=0", "trainer.log_every_n_steps=1", "precision=fp32", "logger=csv",
        "callbacks.samples.every_n_steps=null",
    )  # fmt: skip
    for name, own in {"one": (WHOLE,), "ddp": (HALF, *DDP), "fsdp": (HALF, *FSDP)}.items():
        train(tmp_path, *options, *own, f"hydra.run.dir={name}")
    rows = [row for row in table(tmp_path / "one").values() if row["objective/turns"]]
    assert any(float(row["objective/tool_calls"]) > 0 and float(row["objective/turns"]) > 1 for row in rows)
    assert any(float(row["train/grad_norm"]) > 0 for row in rows)
    names = (*SAME[:6], "objective/turns", "objective/tool_calls", "val/scores", "val/turns")
    for name in ("ddp", "fsdp"):
        assert_same(tmp_path / name, tmp_path / "one", names=names, rounding=1e-5)


CASES = {
    "ppo": (*PPO, "objective.minibatch_size=1"),
    "grpo": (*GRPO, "objective.max_kl=1e-4"),  # some passes end early
    "dapo": (*GRPO, "objective.dynamic_sampling=2", "objective.reward=letters:odd"),
    "lora": (*GRPO, "peft=lora"),  # the reference is the policy without its adapters
    "critic": (*PPO, "objective.reward=judge", "objective.critic=judge"),
    "kept": (*PPO, "strategy.reshard_after_forward=false", "strategy.sharded_checkpoints=true"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_pieces_draw_and_learn_what_copies_do(case: str, folder: Path, judge: str) -> None:
    exported = ADAPTER if case == "lora" else MODEL
    runs = {"ddp": DDP, "fsdp": FSDP}
    for name, strategy in runs.items():
        own = [option for option in CASES[case] if name == "fsdp" or not option.startswith("strategy.")]
        train(folder, *SMALL, *own, "init_from=base/model", HALF, *strategy, f"hydra.run.dir={case}-{name}")
    assert_same(folder / f"{case}-fsdp", folder / f"{case}-ddp", names=SAME, exported=exported, rounding=1e-6)
    lengths = [float(row["objective/response_length"] or 16) for row in table(folder / f"{case}-fsdp").values()]
    assert min(lengths) < 16  # some ended before others


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [DDP, FSDP], ids=["ddp", "fsdp"])
def test_passes_of_a_minibatch_add_up_to_it(strategy: tuple[str, ...], folder: Path) -> None:
    options = (*SMALL, *GRPO, "objective.minibatch_size=8", "init_from=base/model", HALF, *strategy)
    name = strategy[0].partition("=")[2]
    for run, own in {f"minibatch-{name}": (), f"passes-{name}": ("objective.micro_batch_size=4",)}.items():
        train(folder, *options, *own, f"hydra.run.dir={run}")
    assert_same(folder / f"passes-{name}", folder / f"minibatch-{name}", names=SAME, exported=MODEL, rounding=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_first_update_of_a_rollout_starts_at_a_ratio_of_one(precision: str, folder: Path) -> None:
    options = (*PPO, "objective.epochs=1", "init_from=base/model", HALF, *FSDP, f"precision={precision}")
    train(folder, *SMALL, *options, f"hydra.run.dir=first-{precision}")
    rows = [row for row in table(folder / f"first-{precision}").values() if row["policy/ratio"]]
    assert len(rows) == 8
    for row in rows:
        assert float(row["policy/ratio"]) == pytest.approx(1.0, abs=1e-5)
        assert float(row["policy/clipfrac"]) == 0.0
        assert float(row["policy/approxkl"]) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("saved", ["false", "true"], ids=["full", "sharded"])
def test_a_run_that_lost_a_process_draws_and_learns_the_same(saved: str, folder: Path, judge: str) -> None:
    options = (
        *SMALL, *CASES["critic"], "trainer.max_steps=20", "init_from=base/model", "optimizer=adamw", HALF, *FSDP,
        "callbacks.checkpoint.every_n_steps=2", f"strategy.sharded_checkpoints={saved}",
    )  # fmt: skip
    expected, run = folder / f"undisturbed-{saved}", folder / f"lost-{saved}"
    train(folder, *options, f"hydra.run.dir={expected}")
    process = start(folder, *options, f"hydra.run.dir={run}")
    wait_for_step(process, run, 6)
    os.kill(processes(process)[1], signal.SIGKILL)
    process.communicate(timeout=30)
    # the reward is typed again: the run names a function too, before it, which no file makes trusted
    train(folder, "resume=auto", "objective.reward=judge", f"hydra.run.dir={run}")
    assert_equal_to_the_last_bit(run, expected, names=(*SAME, "loss/value"))


@pytest.mark.slow
@pytest.mark.parametrize("peft", ["none", "lora"])
@pytest.mark.parametrize("strategy", [DDP, FSDP], ids=["ddp", "fsdp"])
def test_a_reference_asked_beforehand_by_two_processes_gives_the_losses_of_one(
    strategy: tuple[str, ...], peft: str, folder: Path
) -> None:
    options = (*SMALL, "objective=dpo", "init_from=base/model", "data.path=pairs.jsonl", f"peft={peft}",
               "optimizer.lr=0.3", "trainer.max_steps=4")  # fmt: skip
    run, one = folder / f"dpo-{peft}-{strategy[0].partition('=')[2]}", folder / f"dpo-{peft}"
    if not one.exists():
        train(folder, *options, WHOLE, f"hydra.run.dir={one}")
    kept = ("objective.precompute_reference=true", f"objective.reference_cache={run}-kept")
    train(folder, *options, *kept, HALF, *strategy, f"hydra.run.dir={run}")
    names = ("train/loss", "train/grad_norm", "val/loss", "val/rewards/accuracies")
    assert_same(run, one, names=names, exported=ADAPTER if peft == "lora" else MODEL, rounding=1e-6)
    # another number of processes finds them again
    (file,) = (folder / f"{run.name}-kept").glob("*.npz")
    written = file.read_bytes()
    shutil.rmtree(run)
    train(folder, *options, *kept, WHOLE, f"hydra.run.dir={run}")
    assert file.read_bytes() == written


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_pieces_write_samples_while_they_train(precision: str, folder: Path) -> None:
    options = (*SMALL, "objective=sft", "data.path=chat.jsonl", "data.val_path=null", "init_from=base/model",
               "callbacks.samples.every_n_steps=2", "trainer.max_steps=4", f"precision={precision}")  # fmt: skip
    one = train(folder, *options, WHOLE, f"hydra.run.dir=samples-one-{precision}")
    two = train(folder, *options, HALF, *FSDP, f"hydra.run.dir=samples-two-{precision}")
    written = [out.split("--- step ")[1:] for out in (one, two)]
    assert [text.partition("\n---")[0] for text in written[0]] == [text.partition("\n---")[0] for text in written[1]]
    assert len(written[1]) == 2
