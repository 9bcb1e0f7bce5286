"""The siblings of GRPO as commands: each preset trains, resumes exactly, and is the same in passes of fewer completions."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from genai_pl.modules.grpo import GRPOModule
from genai_pl.modules.policy_gradient import PolicyGradientModule
from tests.conftest import TINY, some
from tests.training.test_alignment import table

SMALL = (*TINY, "model.n_head=4", "optimizer=adamw", "scheduler.warmup_steps=2", "trainer.limit_val_batches=0")
RUN = ("objective.max_new_tokens=8", "data.batch_size=4", "objective.reward=rewards:has_e", "data.path=prompts.jsonl")
REWARD = """
calls = []

def has_e(prompts, completions, **columns):
    calls.append(list(prompts))
    return [float("e" in completion) for completion in completions]

def odd(prompts, completions, **columns):
    return [float(len(completion) % 2) for completion in completions]

def mixed(prompts, completions, **columns):
    return [sum(map(ord, completion)) % 7 / 7 for completion in completions]

def flat(prompts, completions, **columns):
    return [1.0] * len(completions)

def partly(prompts, completions, **columns):
    return [score * (int(prompt.split()[0]) % 2) for prompt, score in zip(prompts, mixed(prompts, completions))]
"""
DAPO = ("objective=dapo", "objective.group_size=2", "objective.overlong_buffer=4", "objective.dynamic_sampling=3")
PRESETS = ("gspo", "cispo", "reinforce", "dr_grpo", "rloo")
SAME = ("train/loss", "objective/scores", "objective/kl", "train/grad_norm", "objective/equal_groups")


@pytest.fixture
def prompts(tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"{i} is "}) + "\n" for i in range(32)))
    (tmp_path / "rewards.py").write_text(REWARD)


@pytest.mark.usefixtures("prompts")
@pytest.mark.parametrize("preset", some(PRESETS))
def test_a_preset_learns_the_same_in_one_pass_and_in_several(preset: str, command, tmp_path: Path) -> None:
    group = () if preset == "reinforce" else ("objective.group_size=4",)
    arguments = (
        "train",
        f"objective={preset}",
        *group,
        *SMALL,
        *RUN,
        "objective.reward=rewards:mixed",
        "trainer.max_steps=2",
    )
    result = command(*arguments, "hydra.run.dir=once")
    assert result.status == 0, result.err
    assert "unused" not in result.out
    assert command(*arguments, "objective.micro_batch_size=2", "hydra.run.dir=parts").status == 0
    once, parts = table(tmp_path / "once"), table(tmp_path / "parts")
    for one, other in zip(once, parts, strict=True):
        for name in ("train/loss", "train/grad_norm", "objective/scores"):
            assert float(one[name]) == pytest.approx(float(other[name]), rel=1e-3, abs=1e-5)
    assert float(once[-1]["train/grad_norm"]) > 0


@pytest.mark.usefixtures("prompts")
@pytest.mark.parametrize("preset", some(["grpo", "gspo"]))
def test_one_update_measures_the_policy_as_a_pass_of_its_own_does(
    preset: str, command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("objective.group_size=4", "objective.beta=0.04", "objective.reward=rewards:mixed", "precision=fp32")
    arguments = ("train", f"objective={preset}", *SMALL, *RUN, *options, "trainer.max_steps=3", "peft=lora")
    arguments += ("objective.micro_batch_size=8", "trainer.log_every_n_steps=1")
    measured: list[bool] = []
    method = GRPOModule.rollout_logprobs

    def counted(self: GRPOModule, rollout: object, *, of_policy: bool = True) -> dict:
        measured.append(of_policy)
        return method(self, rollout, of_policy=of_policy)

    monkeypatch.setattr(GRPOModule, "rollout_logprobs", counted)
    # all completions of a rollout in one update, whose number is named or not
    for name, size in {"once": "null", "twice": "16"}.items():
        assert command(*arguments, f"objective.minibatch_size={size}", f"hydra.run.dir={name}").status == 0
    assert measured == [False] * 3 + [True] * 3
    weights = [load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in ("once", "twice")]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], rtol=1e-4, atol=1e-7)
    for one, other in zip(table(tmp_path / "once"), table(tmp_path / "twice"), strict=True):
        assert float(one["policy/ratio"]) == 1
        for metric in (name for name in one if name.startswith(("objective/", "train/grad", "loss/"))):
            assert float(one[metric]) == pytest.approx(float(other[metric]), rel=1e-4, abs=1e-6), metric


@pytest.mark.usefixtures("prompts")
def test_a_reward_that_tells_nothing_apart_is_said_once_and_the_run_ends(command) -> None:
    options = ("objective.reward=rewards:flat", "objective.dynamic_sampling=2", "trainer.max_steps=2")
    result = command("train", "objective=grpo", "objective.group_size=2", "objective.beta=0", *SMALL, *RUN, *options)
    assert result.status == 0, result.err
    said = "all completions of each prompt of a batch score the same: they teach nothing"
    assert (result.out + result.err).count(said) == 1


@pytest.mark.usefixtures("prompts")
@pytest.mark.parametrize("minibatch", [None, 2], ids=["shared prompts", "a row each"])
def test_groups_without_an_advantage_are_not_run_and_nothing_changes(
    minibatch: int | None, command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = (
        "train",
        "objective=dr_grpo",
        "objective.group_size=4",
        *SMALL,
        *RUN,
        "objective.reward=rewards:partly",
    )
    arguments += ("trainer.max_steps=2", "trainer.log_every_n_steps=1", "precision=fp32", "data.batch_size=8")
    arguments += (f"objective.minibatch_size={minibatch or 'null'}", "objective.epochs=2")
    rows: dict[str, list[int]] = {"fewer": [], "all": []}

    def run(name: str, chosen) -> None:
        def counted(self: GRPOModule, minibatch: dict) -> dict:
            learned = chosen(self, minibatch)
            rows[name].append(len(learned["input_ids"]))
            return learned

        monkeypatch.setattr(GRPOModule, "teaching_rows", counted)
        assert command(*arguments, f"hydra.run.dir={name}").status == 0

    run("fewer", GRPOModule.teaching_rows)
    run("all", PolicyGradientModule.teaching_rows)
    assert len(rows["fewer"]) == len(rows["all"])
    assert 0 < sum(rows["fewer"]) < sum(rows["all"])
    fewer, everything = (load_file(tmp_path / name / "model/model.safetensors") for name in rows)
    for name, weight in everything.items():
        torch.testing.assert_close(fewer[name], weight, rtol=1e-5, atol=1e-6)
    for one, other in zip(table(tmp_path / "fewer"), table(tmp_path / "all"), strict=True):
        for name in ("train/loss", "train/grad_norm", "objective/equal_groups"):
            assert float(one[name]) == pytest.approx(float(other[name]), rel=1e-4, abs=1e-6)


@pytest.mark.usefixtures("prompts")
def test_dynamic_sampling_draws_further_prompts_and_a_resumed_run_draws_the_same(command, tmp_path: Path) -> None:
    arguments = ("train", *DAPO, *SMALL, *RUN, "trainer.max_steps=4", "callbacks.checkpoint.every_n_steps=2")
    assert command(*arguments, "hydra.run.dir=whole").status == 0
    import rewards

    per_step = len(rewards.calls) / 4
    assert 1 < per_step <= 4
    assert all(len(call) % 2 == 0 for call in rewards.calls)
    rows = table(tmp_path / "whole")
    assert sum(float(row["objective/sampled_groups"]) for row in rows) == sum(map(len, rewards.calls)) / 2
    assert max(float(row["objective/taught_groups"]) for row in rows) <= 4
    shutil.copytree(tmp_path / "whole", tmp_path / "half")
    assert command("train", "resume=half/checkpoints/step=000002.ckpt", RUN[2]).status == 0
    whole, half = ([[row[name] for name in SAME] for row in table(tmp_path / run)] for run in ("whole", "half"))
    assert whole == half


@pytest.mark.usefixtures("prompts")
@pytest.mark.parametrize(
    ("options", "message"),
    some(
        [
            (("objective.loss=ppo",), "objective.loss=ppo is not one of grpo, gspo, cispo, rloo"),
            (("objective.kl_estimator=k1",), "objective.kl_estimator=k1 is not one of k2, k3"),
            (
                ("objective.overlong_buffer=9",),
                "objective.overlong_buffer must be from 1 to objective.max_new_tokens=8, not 9",
            ),
            (("objective.dynamic_sampling=-1",), "objective.dynamic_sampling must be at least 0, not -1"),
            (
                ("objective.reward_uncertainty=1",),
                "objective.reward_uncertainty=1 needs a number of at least 0, two rewards",
            ),
        ]
    ),
)
def test_a_mistake_is_one_line(options: tuple[str, ...], message: str, command) -> None:
    result = command("train", "objective=grpo", *SMALL, *RUN, *options)
    assert result.status in (1, 2)
    assert result.err.startswith("error: ")
    assert message in result.err
    assert result.err.count("\n") == 1


@pytest.mark.usefixtures("prompts")
def test_penalties_for_length_and_an_ensemble_change_the_scores_as_written(command, tmp_path: Path) -> None:
    arguments = ("train", "objective=grpo", "objective.group_size=4", *SMALL, *RUN, "trainer.max_steps=1")
    pair = ("objective.reward=[rewards:has_e,rewards:odd]", "objective.reward_weights=[0.5,0.5]")
    assert command(*arguments, *pair, "hydra.run.dir=mean").status == 0
    ensemble = ("objective.reward=[rewards:has_e,rewards:odd]", "objective.reward_uncertainty=2")
    assert command(*arguments, *ensemble, "hydra.run.dir=ensemble").status == 0
    assert command(*arguments, *pair, "objective.length_penalty=0.1", "hydra.run.dir=short").status == 0
    mean, pessimist, short = (table(tmp_path / run)[0] for run in ("mean", "ensemble", "short"))
    length = float(mean["objective/response_length"])
    assert float(short["objective/scores"]) == pytest.approx(float(mean["objective/scores"]) - 0.1 * length, abs=1e-5)
    # of two rewards of 0 or 1 the mean less two deviations is 1 where both are, else 0 or less: -0.5 where they disagree
    assert float(pessimist["objective/scores"]) < float(mean["objective/scores"])
