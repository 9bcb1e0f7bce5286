"""Alignment as commands: reward model, DPO and its siblings, GRPO and PPO, each on what a few steps can teach."""

import csv
import json
from pathlib import Path

import pytest
import torch

from tests.conftest import TINY, some

SMALL = (*TINY, "model.n_head=4", "optimizer=adamw", "scheduler.warmup_steps=2")
LLAMA = (*SMALL, "model=llama", "model.n_kv_head=2", "model.intermediate_size=64")
REWARD = """
def many_e(prompts, completions, **columns):
    assert set(columns) == {"answer"} and len(columns["answer"]) == len(prompts)
    return [completion.count("e") / 10 for completion in completions]


def too_few(prompts, completions, **columns):
    return [0.0]
"""


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def table(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    rows = [{"prompt": f"{i} is", "chosen": " good", "rejected": " bad"} for i in range(32)]
    write(tmp_path / "pairs.jsonl", rows)
    return "data.path=pairs.jsonl"


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    write(tmp_path / "prompts.jsonl", [{"prompt": f"{i} is ", "answer": i} for i in range(32)])
    (tmp_path / "rewards.py").write_text(REWARD)
    return "data.path=prompts.jsonl"


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "hinge", "robust", "orpo", "simpo", "cpo"])
def test_every_preference_loss_learns_what_was_preferred(loss: str, pairs: str, command, tmp_path: Path) -> None:
    result = command(
        "train", "objective=dpo", *LLAMA, pairs, f"objective.loss={loss}", "trainer.max_steps=15", "optimizer.lr=3e-3",
        "hydra.run.dir=run",
    )  # fmt: skip
    assert result.status == 0, result.err
    rows = table(tmp_path / "run")
    assert float(rows[-1]["val/rewards/accuracies"]) == 1.0
    if loss == "sigmoid":  # policy and reference are the same before the first step
        assert float(rows[0]["train/loss"]) == pytest.approx(0.693147, abs=1e-5)
        assert float(rows[0]["rewards/margins"]) == pytest.approx(0.0, abs=1e-5)


def test_kto_learns_what_was_liked(command, tmp_path: Path) -> None:
    rows = [{"prompt": f"{i} is", "completion": " good" if i % 2 else " bad", "label": bool(i % 2)} for i in range(64)]
    write(tmp_path / "liked.jsonl", rows)
    result = command(
        "train", "objective=kto", *LLAMA, "data.path=liked.jsonl", "trainer.max_steps=20", "optimizer.lr=3e-3",
        "hydra.run.dir=run",
    )  # fmt: skip
    assert result.status == 0, result.err
    rows = table(tmp_path / "run")
    assert float(rows[0]["train/loss"]) == pytest.approx(0.5, abs=1e-5)  # sigmoid(0): policy and reference are the same
    assert float(rows[-1]["val/rewards/margins"]) > 0.1


def test_log_probabilities_of_completions_are_those_of_transformers(pairs: str, command, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert command("train", "objective=dpo", *LLAMA, pairs, "data.val_path=pairs.jsonl", "trainer.limit_val_batches=1.0",
                   "hydra.run.dir=run").status == 0  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run/model")
    sums = dict.fromkeys(("chosen", "rejected"), 0.0)
    for line in (tmp_path / "pairs.jsonl").read_text().splitlines():
        row = json.loads(line)
        prompt_ids = tokenizer(row["prompt"])["input_ids"]
        for name in sums:
            ids = prompt_ids + tokenizer(row[name])["input_ids"] + [tokenizer.eos_token_id]
            with torch.no_grad():
                logprobs = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
            targets = torch.tensor(ids[1:])
            sums[name] += logprobs.gather(1, targets[:, None])[len(prompt_ids) - 1 :].sum().item()
    last = table(tmp_path / "run")[-1]
    for name, total in sums.items():
        assert float(last[f"val/logps/{name}"]) == pytest.approx(total / 32, abs=1e-3)


@pytest.mark.parametrize("model", ["llama", "gpt", "encoder_nano"])
def test_a_reward_model_learns_and_transformers_gives_its_scores(
    model: str, pairs: str, command, tmp_path: Path
) -> None:
    from transformers import AutoModelForSequenceClassification

    from genai_pl.loading import load
    from genai_pl.modules.reward import scores

    extra = LLAMA if model == "llama" else (*SMALL, f"model={model}", "model.max_seq_len=64")
    result = command(
        "train", "objective=reward", *extra, pairs, "trainer.max_steps=15", "optimizer.lr=3e-3", "hydra.run.dir=run"
    )
    assert result.status == 0, result.err
    assert float(table(tmp_path / "run")[-1]["val/accuracy"]) == 1.0
    if model == "encoder_nano":
        return
    ours = load("run")
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run/model")
    ids = torch.tensor([ours.tokenizer("3 is good")["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(
            scores(ours.model, ids, torch.ones_like(ids), 1), theirs(ids).logits, atol=1e-5, rtol=0
        )


def test_a_lone_last_validation_row_is_not_its_own_mismatch(command, tmp_path: Path) -> None:
    rows = [
        {"prompt": f"{n} is", "completion": " good" if n % 2 else " a bad one", "label": n % 2 == 1} for n in range(9)
    ]
    write(tmp_path / "liked.jsonl", rows[:8])
    write(tmp_path / "held.jsonl", rows[:5])
    kl = []
    for size in (4, 5):  # 4 and 1, or all at once
        result = command(
            "train", "objective=kto", *LLAMA, "data.path=liked.jsonl", "data.val_path=held.jsonl", "optimizer.lr=1e-2",
            "objective.beta=1.0", "trainer.max_steps=6", "data.shuffle=false", f"data.val_batch_size={size}",
            f"hydra.run.dir=run{size}",
        )  # fmt: skip
        assert result.status == 0, result.err
        kl.append(float(table(tmp_path / f"run{size}")[-1]["val/kl"]))
    assert kl[0] == pytest.approx(kl[1], rel=1e-6)


def test_a_kto_batch_of_one_row_is_refused(command, tmp_path: Path) -> None:
    rows = [{"prompt": f"{n} is", "completion": " good", "label": True} for n in range(8)]
    write(tmp_path / "liked.jsonl", rows)
    result = command("train", "objective=kto", *LLAMA, "data.path=liked.jsonl", "data.batch_size=1")
    assert result.status == 2
    assert result.err.startswith("error: data.batch_size=1 gives a process 1 of")
    assert result.err.count("\n") == 1


RL = ("objective.max_new_tokens=8", "data.batch_size=4", "objective.reward=rewards:many_e")
KINDS = {
    "grpo": ("objective=grpo", "objective.group_size=4"),
    "rloo": ("objective=grpo", "objective.group_size=4", "objective.advantage=rloo", "objective.normalization=token"),
    "dr_grpo": ("objective=grpo", "objective.group_size=4", "objective.scale=none", "objective.normalization=constant"),
    "ppo": ("objective=ppo", "objective.epochs=2", "objective.minibatch_size=2", "objective.kl_target=1.0"),
}


@pytest.mark.parametrize("kind", some(KINDS))
def test_rollouts_are_learned_from_and_a_resumed_run_draws_the_same(
    kind: str, prompts: str, command, tmp_path: Path
) -> None:
    arguments = (
        "train",
        *KINDS[kind],
        *SMALL,
        prompts,
        *RL,
        "trainer.max_steps=8",
        "callbacks.checkpoint.every_n_steps=4",
    )
    result = command(*arguments, "hydra.run.dir=whole")
    assert result.status == 0, result.err
    assert command(*arguments, "hydra.run.dir=half").status == 0
    result = command("train", "resume=half/checkpoints/step=000004.ckpt")
    assert (result.status, "objective.reward=rewards:many_e names code to run" in result.err) == (1, True)
    assert command("train", "resume=half/checkpoints/step=000004.ckpt", RL[2]).status == 0
    same = ("train/loss", "objective/scores", "objective/kl", "train/grad_norm", "val/scores")
    whole, half = ([[row[name] for name in same] for row in table(tmp_path / run)] for run in ("whole", "half"))
    assert whole == half


@pytest.mark.parametrize("kind", ["grpo", "ppo"])
def test_the_first_update_of_a_rollout_starts_at_a_ratio_of_one(
    kind: str, prompts: str, command, tmp_path: Path
) -> None:
    once = ("objective.epochs=1", "objective.minibatch_size=null")
    result = command("train", f"objective={kind}", *SMALL, prompts, *RL, *once, "hydra.run.dir=run")
    assert result.status == 0, result.err
    rows = [row for row in table(tmp_path / "run") if row["policy/ratio"]]
    assert rows
    for row in rows:
        assert float(row["policy/ratio"]) == pytest.approx(1.0, abs=1e-5)
        assert float(row["policy/clipfrac"]) == 0.0
        assert float(row["policy/approxkl"]) == pytest.approx(0.0, abs=1e-6)


def test_a_policy_learns_what_is_rewarded(prompts: str, command, tmp_path: Path) -> None:
    result = command(
        "train", "objective=grpo", *SMALL, prompts, *RL, "objective.group_size=8", "trainer.max_steps=40",
        "optimizer.lr=1e-2", "objective.beta=0.0", "trainer.val_check_interval=40", "hydra.run.dir=run",
    )  # fmt: skip
    assert result.status == 0, result.err
    scores = [float(row["objective/scores"]) for row in table(tmp_path / "run") if row["objective/scores"]]
    assert sum(scores[-5:]) / 5 > 3 * sum(scores[:5]) / 5 + 0.1


def test_a_reward_model_judges_rollouts(pairs: str, prompts: str, command) -> None:
    assert command("train", "objective=reward", *LLAMA, pairs, "hydra.run.dir=judge").status == 0
    result = command("train", *KINDS["grpo"], *SMALL, prompts, *RL[:2], "objective.reward=judge")
    assert result.status == 0, result.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "objective.reward is not set"),
        (("objective.reward=rewards:none",), "objective.reward=rewards:none: cannot be imported"),
        (("objective.reward=nothing:f",), "objective.reward=nothing:f: cannot be imported (No module named 'nothing')"),
        (("objective.reward=rewards:too_few",), "objective.reward gave (1,) numbers for 16 completions"),
        (("objective.reward=rewards:many_e", "objective.group_size=1"), "objective.group_size must be at least 2"),
        (("objective.reward=rewards:many_e", "objective.reward_weights=[1,2]"), "has 2 numbers for 1 rewards"),
        (("objective.reward=rewards:many_e", "trainer.accumulate_grad_batches=2"), "rollouts have minibatches instead"),
    ],
)
def test_a_mistake_with_rewards_is_one_line(arguments: tuple[str, ...], message: str, prompts: str, command) -> None:
    result = command("train", *KINDS["grpo"], *SMALL, prompts, *RL[:2], *arguments)
    assert result.status in (1, 2)
    assert message in result.err
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1


def test_the_commands_of_the_documentation_work_as_written(command, tmp_path: Path) -> None:
    rows = [{"prompt": f"{i} is", "completion": " good", "chosen": " good", "rejected": " bad"} for i in range(16)]
    for name, columns in (
        ("chat", ("prompt", "completion")),
        ("pairs", ("prompt", "chosen", "rejected")),
        ("prompts", ("prompt",)),
    ):
        write(tmp_path / f"{name}.jsonl", [{column: row[column] for column in columns} for row in rows])
    assert command("train", "data.path=chat.jsonl", "data.column=prompt", *LLAMA, "hydra.run.dir=first").status == 0
    text = (Path(__file__).parents[2] / "docs" / "alignment.md").read_text()
    lines = [line.partition("#")[0] for line in text.split("```")[1].strip().splitlines()]
    assert len(lines) == 7
    small = ("data.batch_size=2", "trainer.max_steps=2", "callbacks.samples.every_n_steps=null")
    for line in lines:
        script, *arguments = line.replace("BASE", "first").split()[1:]
        extra = small if script == "train.py" else ()
        extra += ("objective.max_new_tokens=4", "objective.minibatch_size=2") if "objective=ppo" in arguments else ()
        result = command(script.removesuffix(".py"), *arguments, *extra)
        assert result.status == 0, f"{line}: {result.err}"
    rows = table(tmp_path / "ppo")
    assert rows[-1]["val/scores"]
    assert "length_correlation" in result.out


def test_completions_that_no_reward_applies_to_are_in_no_mean(prompts: str, command, tmp_path: Path) -> None:
    (tmp_path / "some.py").write_text(
        "def score(prompts, completions, answer, **columns):\n    return [1.0 if a % 2 else None for a in answer]\n"
    )
    arguments = ("objective.max_new_tokens=8", "data.batch_size=4", "objective.reward=some.py:score")
    result = command("train", *KINDS["grpo"], *SMALL, prompts, *arguments, "hydra.run.dir=run")
    assert result.status == 0, result.err
    rows = table(tmp_path / "run")
    assert {float(row["objective/scores"]) for row in rows if row["objective/scores"]} <= {0.0, 1.0}  # 0: none at all
    assert {float(row["val/scores"]) for row in rows if row["val/scores"]} == {1.0}
    refused = command("train", *KINDS["ppo"], *SMALL, prompts, *arguments)
    assert refused.err.startswith("error: objective.reward: no reward applies to some completions")
