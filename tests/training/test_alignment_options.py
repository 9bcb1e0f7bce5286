"""What alignment takes beside its defaults: critics, shared bases, early ends, references kept on disk, rankings, figures."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from genai_pl.loading import load
from genai_pl.models.pooling import scores
from genai_pl.modules import grpo, ppo
from genai_pl.modules import rollout_module as writing
from genai_pl.modules.preference import token_logprobs
from tests.conftest import TINY

LLAMA = (
    *TINY, "model=llama", "model.n_head=4", "model.n_kv_head=2", "model.intermediate_size=64", "optimizer=adamw",
    "scheduler.warmup_steps=2",
)  # fmt: skip
PPO = (
    "objective=ppo", "objective.max_new_tokens=8", "data.path=prompts.jsonl", "objective.epochs=2",
    "objective.minibatch_size=2",
)  # fmt: skip


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def table(run: str) -> list[dict[str, str]]:
    with Path(run, "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def column(run: str, name: str) -> list[float]:
    return [float(row[name]) for row in table(run) if row.get(name)]


@pytest.fixture
def files(tmp_path: Path) -> None:
    write(tmp_path / "pairs.jsonl", [{"prompt": f"{i} is", "chosen": " good", "rejected": " bad"} for i in range(32)])
    write(tmp_path / "prompts.jsonl", [{"prompt": f"{i} is "} for i in range(32)])
    (tmp_path / "letters.py").write_text(
        "def e(prompts, completions):\n    return [c.count('e') for c in completions]\n"
    )


@pytest.fixture
def base(files: None, command) -> str:
    """A small model in the folder `base`."""
    arguments = ("data.path=prompts.jsonl", "data.column=prompt", "trainer.max_steps=12", "optimizer.lr=1e-2")
    result = command("train", *LLAMA, *arguments, "hydra.run.dir=base")
    assert result.status == 0, result.err
    return "init_from=base/model"


@pytest.mark.parametrize("objective", ["ppo", "grpo"])
def test_a_rollout_writes_every_documented_figure_and_what_was_written(objective: str, files: None, command) -> None:
    own = PPO if objective == "ppo" else ("objective=grpo", "objective.max_new_tokens=8", "data.path=prompts.jsonl")
    arguments = (*own, *LLAMA, "objective.reward=letters:e", "callbacks.samples.every_n_steps=3", "hydra.run.dir=run")
    result = command("train", *arguments)
    assert result.status == 0, result.err
    names = ["kl", "entropy", "scores", "rlhf_reward", "response_length"]
    names = [f"objective/{name}" for name in names] + ["policy/approxkl", "policy/clipfrac", "policy/ratio"]
    names += ["loss/policy", "val/response_length", "val/scores", "val/kl"] + ["loss/value"] * (objective == "ppo")
    names += ["objective/equal_groups"] * (objective == "grpo")
    assert all(column("run", name) for name in names)
    # random weights over 258 bytes say anything with about the same probability
    assert column("run", "objective/entropy")[0] == pytest.approx(math.log(258), abs=0.1)
    texts = {}
    for file in Path("run/tensorboard").rglob("events*"):
        events = EventAccumulator(str(file), size_guidance={"tensors": 0}).Reload()
        texts |= {tag: events.Tensors(tag)[-1].tensor_proto.string_val[0].decode() for tag in events.Tags()["tensors"]}
    for part in ("training", "validation"):
        header, _, *rows = texts[f"samples/{part}/text_summary"].splitlines()
        assert header == "| prompt | completion | score | KL |"
        assert len(rows) == 4
        for row in rows:
            prompt, rest = row.removeprefix("| ").split(" | ", 1)
            completion, score, _ = rest.removesuffix(" |").rsplit(" | ", 2)
            assert prompt.rstrip().endswith("is")
            assert float(score) == completion.count("e")


def test_completions_that_share_their_prompt_teach_what_they_teach_apart(files: None, command, monkeypatch) -> None:
    arguments = ("train", "objective=grpo", "objective.group_size=4", "objective.max_new_tokens=8", "data.path=prompts.jsonl",
             "objective.epochs=2", *LLAMA, "objective.reward=letters:e")  # fmt: skip
    tokens = []

    def counted(model, batch, **arguments):
        tokens.append(batch["input_ids"].numel())
        return token_logprobs(model, batch, **arguments)

    for module in (writing, grpo):
        monkeypatch.setattr(module, "token_logprobs", counted)
    assert command(*arguments, "hydra.run.dir=shared").status == 0
    together = sum(tokens)
    tokens.clear()
    monkeypatch.setattr(writing, "supports_shared_prompts", lambda model: False)
    assert command(*arguments, "hydra.run.dir=apart").status == 0
    assert together < 0.8 * sum(tokens)
    for name in ("train/loss", "objective/scores", "objective/kl", "objective/entropy", "policy/ratio", "val/scores"):
        assert column("shared", name) == pytest.approx(column("apart", name), abs=1e-5), name


@pytest.mark.parametrize("objective", ["ppo", "grpo"])
def test_passes_of_a_minibatch_add_up_to_it(objective: str, files: None, command, monkeypatch) -> None:
    own = {"ppo": (*PPO, "objective.minibatch_size=8"), "grpo": ("objective=grpo", "objective.group_size=4")}[objective]
    arguments = ("train", *own, *LLAMA, "objective.max_new_tokens=8", "objective.epochs=2", "objective.reward=letters:e",
             "data.path=prompts.jsonl", "data.batch_size=8", "optimizer=sgd", "optimizer.lr=0.1")  # fmt: skip
    sizes = []

    def counted(model, batch, **arguments):
        sizes.append(int(batch["segment_ids"].amax(1).sum()))
        return token_logprobs(model, batch, **arguments)

    for module in (writing, grpo, ppo):
        monkeypatch.setattr(module, "token_logprobs", counted)
    assert command(*arguments, "hydra.run.dir=whole").status == 0
    assert max(sizes) == (8 if objective == "ppo" else 32)
    sizes.clear()
    assert command(*arguments, "objective.micro_batch_size=4", "hydra.run.dir=few").status == 0
    assert max(sizes) == 4
    names = ("train/loss", "train/grad_norm", "objective/scores", "objective/kl", "objective/entropy", "policy/ratio",
             "policy/approxkl", "loss/policy", "val/scores", "val/kl")  # fmt: skip
    for name in names:
        assert column("few", name) == pytest.approx(column("whole", name), rel=1e-4, abs=1e-6), name
    result = command(*arguments, "objective.micro_batch_size=0")
    assert result.err == "error: objective.micro_batch_size must be at least 1, not 0\n"


def test_minibatches_of_rollouts_are_whole_groups_where_they_can_be(files: None, command) -> None:
    arguments = ("train", "objective=grpo", "objective.group_size=4", "objective.max_new_tokens=8", "data.path=prompts.jsonl",
             *LLAMA, "data.batch_size=4", "objective.reward=letters:e")  # fmt: skip
    for size, updates in ((16, 1.0), (8, 2.0), (6, 3.0), (2, 8.0)):
        result = command(*arguments, f"objective.minibatch_size={size}", f"hydra.run.dir=run{size}")
        assert result.status == 0, result.err
        assert set(column(f"run{size}", "policy/updates")) == {updates}
        rollout_line = next(line for line in result.out.splitlines() if line.startswith("rollout "))
        assert rollout_line.split(maxsplit=1)[1].startswith(
            f"16 completions (4 prompts x 4 x 1 devices) of at most 8 tokens, then {updates:.0f} steps"
        )


def test_an_epoch_ends_when_the_policy_has_moved_far_enough(files: None, command) -> None:
    arguments = (*PPO, *LLAMA, "objective.reward=letters:e", "objective.epochs=4", "optimizer.lr=1e-2", "scheduler=constant",
             "scheduler.warmup_steps=0", "trainer.max_steps=24")  # fmt: skip
    assert command("train", *arguments, "hydra.run.dir=free").status == 0
    assert command("train", *arguments, "objective.max_kl=1e-4", "hydra.run.dir=held").status == 0
    assert set(column("free", "policy/updates")) == {8.0}  # 4 passes, two minibatches each
    assert max(column("held", "policy/updates")[1:]) < 8
    result = command("train", *arguments, "objective.max_kl=0")
    assert result.err == "error: objective.max_kl must be above 0, not 0\n"


def test_groups_of_equal_scores_are_counted(files: None, command, tmp_path: Path) -> None:
    (tmp_path / "odd.py").write_text(
        "def score(prompts, completions):\n"
        "    return [i % 2 if int(p.split()[0]) % 2 else 1 for i, p in enumerate(prompts)]\n"
    )
    arguments = ("train", "objective=grpo", "objective.group_size=4", "objective.max_new_tokens=4", "data.path=prompts.jsonl",
             *LLAMA, "objective.reward=odd:score", "data.shuffle=false", "data.val_path=prompts.jsonl",
             "data.batch_size=8")  # fmt: skip
    assert command(*arguments, "hydra.run.dir=run").status == 0
    assert set(column("run", "objective/equal_groups")) == {0.5}  # the even prompts'


def test_an_entropy_bonus_raises_entropy(base: str, command) -> None:
    arguments = (*PPO, *LLAMA, base, "objective.reward=letters:e", "objective.entropy_coef=1.0", "optimizer.lr=3e-3")
    assert command("train", *arguments, "trainer.max_steps=12", "hydra.run.dir=run").status == 0
    first, *_, last = column("run", "objective/entropy")
    assert first < 5.0  # of at most log 258 = 5.55
    assert last > first + 0.1


def test_a_critic_of_its_own_is_trained_and_resumed_exactly(base: str, command) -> None:
    reward = ("train", "objective=reward", *LLAMA, base, "data.path=pairs.jsonl", "hydra.run.dir=judge")
    assert command(*reward).status == 0
    arguments = ("train", *PPO, *LLAMA, base, "objective.reward=judge", "objective.critic=judge", "trainer.max_steps=8",
             "callbacks.checkpoint.every_n_steps=4")  # fmt: skip
    result = command(*arguments, "hydra.run.dir=whole")
    assert result.status == 0, result.err
    assert command(*arguments, "hydra.run.dir=half").status == 0
    assert command("train", "resume=half/checkpoints/step=000004.ckpt").status == 0
    same = ("train/loss", "loss/value", "objective/scores", "train/grad_norm", "val/scores")
    assert [column("whole", name) for name in same] == [column("half", name) for name in same]
    state = torch.load("whole/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    judge = load("judge").model.state_dict()
    trained = state["critic.blocks.0.attention.q_proj.weight"]
    assert trained.shape == judge["blocks.0.attention.q_proj.weight"].shape
    assert not torch.equal(trained, judge["blocks.0.attention.q_proj.weight"])
    assert not any("lm_head" in name for name in state if name.startswith("critic."))
    result = command("train", *PPO, *LLAMA, base, "objective.reward=judge", "objective.critic=nowhere")
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1


def test_values_begin_as_the_scores_of_the_critic(base: str, command) -> None:
    from genai_pl.modules.ppo import PPOModule

    reward = ("train", "objective=reward", *LLAMA, base, "data.path=pairs.jsonl", "hydra.run.dir=judge")
    assert command(*reward).status == 0
    judge, policy = load("judge"), load("base")
    ids = torch.tensor([judge.tokenizer("3 is good")["input_ids"]])
    with torch.no_grad():
        expected = scores(judge.model, ids, torch.ones_like(ids), 1)
    module = PPOModule.__new__(PPOModule)
    torch.nn.Module.__init__(module)
    module.model, module.critic_name = policy.model, "judge"
    module.use_critic(judge.model)
    with torch.no_grad():
        values = module._values({"input_ids": ids, "segment_ids": torch.ones_like(ids)}, None)
    torch.testing.assert_close(values[:, -1], expected[:, 0], atol=1e-6, rtol=0)


def test_a_reward_adapter_on_the_policys_base_shares_its_weights_and_scores_as_before(base: str, command) -> None:
    from genai_pl.peft import base_tensors, lora
    from genai_pl.training.rewards import load_rewards

    reward = ("train", "objective=reward", "peft=lora", *LLAMA, base, "data.path=pairs.jsonl", "optimizer.lr=1e-2",
              "hydra.run.dir=judge")  # fmt: skip
    assert command(*reward).status == 0
    prompts, completions = ["3 is", "4 is"], [" good", " bad"]
    alone = load_rewards(["judge"], None, policy=torch.nn.Module(), device=torch.device("cpu"))(prompts, completions)
    policy = lora(load("base").model, rank=2)
    judge = load_rewards(["judge"], None, policy=policy, device=torch.device("cpu"))
    assert judge(prompts, completions) == pytest.approx(alone, abs=1e-7)
    for _, _, _, x in base_tensors(policy):
        x.data.zero_()  # it is one memory: the judge loses its base too
    assert judge(prompts, completions) != pytest.approx(alone, abs=1e-4)
    result = command("train", *PPO, *LLAMA, base, "peft=lora", "objective.reward=judge", "hydra.run.dir=run")
    assert result.status == 0, result.err


def test_references_kept_on_disk_give_the_same_losses_and_are_used_again(base: str, command, tmp_path: Path) -> None:
    for peft in ("none", "lora"):
        arguments = (
            "train",
            "objective=dpo",
            *LLAMA,
            base,
            f"peft={peft}",
            "data.path=pairs.jsonl",
            "optimizer.lr=3e-3",
        )
        cached = (*arguments, "objective.precompute_reference=true", f"objective.reference_cache={tmp_path}/kept")
        assert command(*arguments, f"hydra.run.dir=asked_{peft}").status == 0
        result = command(*cached, f"hydra.run.dir=kept_{peft}")
        assert result.status == 0, result.err
        for name in ("train/loss", "rewards/margins", "val/loss", "val/rewards/chosen"):
            expected = column(f"asked_{peft}", name)
            np.testing.assert_allclose(column(f"kept_{peft}", name), expected, atol=2e-6)
    # the base of the adapter is the model itself: one file for both
    (file,) = Path("kept").glob("*.npz")
    written = file.stat().st_mtime_ns
    # other rates of learning need no new answers; another row does
    assert command(*cached, "optimizer.lr=1e-3").status == 0
    assert file.stat().st_mtime_ns == written
    rows = [{"prompt": "a row", "chosen": " that is", "rejected": " new"}]
    write(tmp_path / "more.jsonl", rows + [json.loads(line) for line in Path("pairs.jsonl").read_text().splitlines()])
    assert command(*cached, "data.path=more.jsonl").status == 0
    with np.load(file) as archive:
        assert len(archive["keys"]) == 33


@pytest.mark.parametrize("loss", ["pairs", "plackett_luce"])
def test_a_reward_model_learns_rankings_of_any_length(loss: str, command, tmp_path: Path) -> None:
    words = [" best", " good", " bad", " worst"]
    rows = [{"prompt": f"{i} is", "completions": [words[0], *words[1 + i % 2 :]]} for i in range(32)]
    write(tmp_path / "ranked.jsonl", rows)
    result = command("train", "objective=reward", f"objective.ranking={loss}", *LLAMA, "data.path=ranked.jsonl",
                     "objective.centering=0.01", "trainer.max_steps=40", "optimizer.lr=3e-3", "hydra.run.dir=judge")  # fmt: skip
    assert result.status == 0, result.err
    assert column("judge", "val/accuracy")[-1] == 1.0
    judge = load("judge")
    rewards = []
    for word in words:
        ids = torch.tensor([[*judge.tokenizer(f"3 is{word}")["input_ids"], judge.tokenizer.eos_token_id]])
        with torch.no_grad():
            rewards.append(scores(judge.model, ids, torch.ones_like(ids), 1).item())
    assert rewards == sorted(rewards, reverse=True)
    result = command("train", "objective=dpo", *LLAMA, "data.path=ranked.jsonl")
    assert result.err == (
        "error: data.path=ranked.jsonl: ranked completions are for objective=reward; give pairs, chosen and rejected\n"
    )


def test_evaluate_says_how_often_a_reward_model_is_right_and_what_length_has_to_do_with_it(
    base: str, command, tmp_path: Path
) -> None:
    arguments = ("train", "objective=reward", *LLAMA, base, "data.path=pairs.jsonl", "optimizer.lr=3e-3")
    assert command(*arguments, "trainer.max_steps=15", "hydra.run.dir=judge").status == 0
    # the judge prefers " good", which is the longer one: two right, one wrong, one tie
    rows = [
        {"prompt": "1 is", "chosen": " good", "rejected": " bad"},
        {"prompt": "2 is", "chosen": " good", "rejected": " bad"},
        {"prompt": "3 is", "chosen": " good", "rejected": " good"},
        {"prompt": "4 is", "chosen": " bad", "rejected": " good"},
    ]
    write(tmp_path / "held.jsonl", rows)
    result = command("evaluate", "checkpoint=judge", "data.path=held.jsonl", "out=figures.json")
    assert result.status == 0, result.err
    figures = json.loads(Path("figures.json").read_text())
    assert figures["accuracy"] == figures["longer_is_better"] == pytest.approx(2.5 / 4)
    assert figures["length_correlation"] == pytest.approx(1.0, abs=0.05)
    assert figures["rows"] == 4
    assert figures["accuracy_low"] < 0.3
    assert figures["accuracy_high"] > 0.85
    result = command("evaluate", "checkpoint=judge", "data.path=prompts.jsonl", "data.column=prompt")
    assert "a reward model compares" in result.err


def test_evaluate_compares_log_probabilities_of_a_language_model(base: str, command) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained("base/model"), AutoTokenizer.from_pretrained("base/model")

    def logprob(prompt: str, completion: str) -> float:
        prompt_ids, completion_ids = (
            tokenizer(prompt)["input_ids"],
            [*tokenizer(completion)["input_ids"], tokenizer.eos_token_id],
        )
        with torch.no_grad():
            logprobs = model(torch.tensor([prompt_ids + completion_ids])).logits[0, :-1].log_softmax(-1)
        return (
            logprobs[
                torch.arange(len(prompt_ids) - 1, len(prompt_ids + completion_ids) - 1), torch.tensor(completion_ids)
            ]
            .sum()
            .item()
        )

    rows = [json.loads(line) for line in Path("pairs.jsonl").read_text().splitlines()]
    margins = [logprob(row["prompt"], row["chosen"]) - logprob(row["prompt"], row["rejected"]) for row in rows]
    result = command("evaluate", "checkpoint=base", "data.path=pairs.jsonl", "out=figures.json")
    assert result.status == 0, result.err
    figures = json.loads(Path("figures.json").read_text())
    assert figures["accuracy"] == pytest.approx(np.mean([m > 0 for m in margins]))
    assert figures["margin"] == pytest.approx(np.mean(margins), abs=1e-4)
    assert figures["longer_is_better"] == 1.0


def test_wilsons_interval_is_the_published_one() -> None:
    from genai_pl.evaluation.metrics import wilson

    # Newcombe 1998, table I, method 3: 81 of 263, 15 of 148, 0 of 20, 1 of 29
    for hits, n, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611),
                               (1, 29, 0.0061, 0.1718)):  # fmt: skip
        assert wilson(hits / n, n) == pytest.approx((low, high), abs=5e-5)
