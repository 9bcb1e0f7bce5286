"""Runs in environments: episodes are learned from, a resumed run plays the same ones, and mistakes are one line."""

import csv
import json
import sys
from pathlib import Path

import pytest

from genai_pl.errors import ConfigError
from genai_pl.modules import episodes
from genai_pl.training.environments import load_environment
from tests.conftest import TINY, some

SMALL = (
    *TINY,
    "model.n_head=4",
    "optimizer=adamw",
    "scheduler.warmup_steps=2",
    "model.max_seq_len=64",
    "precision=fp32",
)
GAME = (
    "objective.environment=guess_number", "objective.environment_args={low: 1, high: 4, guesses: 3}",
    "objective.max_new_tokens=3", "data.path=games.jsonl", "objective.max_turns=3",
)  # fmt: skip
KINDS = {
    "grpo": ("objective=grpo", "objective.group_size=4", "objective.beta=0.1"),
    "ppo": ("objective=ppo", "objective.epochs=1", "objective.minibatch_size=null"),
    "dapo": ("objective=dapo", "objective.group_size=4", "objective.overlong_buffer=null"),
}
COUNTER = """
from genai_pl.environments import Environment, Observation


class Counter(Environment):
    async def step(self, completion):
        return Observation(" more:", reward=completion.count("e"), done=False)


class Half:
    def reset(self, row):
        return row["prompt"]
"""
# as Qwen's, in short
TEMPLATE = (
    "{% if tools %}{{ tools | map(attribute='function') | map(attribute='name') | list | tojson }}{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def games(tmp_path: Path) -> None:
    rows = [{"prompt": "Guess: ", "number": n % 4 + 1} for n in range(32)]
    (tmp_path / "games.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tasks.py").write_text(COUNTER)


def table(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("kind", some(KINDS))
def test_a_resumed_run_plays_the_same_episodes_to_the_bit(kind: str, games: None, command, tmp_path: Path) -> None:
    arguments = ("train", *KINDS[kind], *SMALL, *GAME, "trainer.max_steps=4", "callbacks.checkpoint.every_n_steps=2")
    result = command(*arguments, "hydra.run.dir=whole")
    assert result.status == 0, result.err
    assert " turns of 3 tokens" in result.out + result.err
    assert command(*arguments, "hydra.run.dir=half").status == 0
    assert command("train", "resume=half/checkpoints/step=000002.ckpt").status == 0
    same = (
        "train/loss",
        "objective/scores",
        "objective/turns",
        "objective/episode_length",
        "train/grad_norm",
        "val/found",
    )
    whole, half = ([[row[name] for name in same] for row in table(tmp_path / run)] for run in ("whole", "half"))
    assert whole == half
    rows = [row for row in table(tmp_path / "whole") if row["policy/ratio"]]
    assert any(float(row["objective/turns"]) > 1 for row in rows)
    assert any(float(row["objective/episode_length"]) > float(row["objective/response_length"]) for row in rows)
    # what is learned is what was sampled, in the context in which it was sampled
    assert [float(row["policy/ratio"]) for row in rows] == [1.0] * len(rows)
    assert [float(row["policy/approxkl"]) for row in rows] == [0.0] * len(rows)


def test_an_environment_of_a_file_gives_the_rewards_of_its_turns(games: None, command, tmp_path: Path) -> None:
    result = command(
        "train", *KINDS["grpo"], *SMALL, *GAME[2:], "objective.environment=tasks.py:Counter", "trainer.max_steps=2",
        "hydra.run.dir=run",
    )  # fmt: skip
    assert result.status == 0, result.err
    assert {row["objective/turns"] for row in table(tmp_path / "run") if row["objective/turns"]} == {"3.0"}
    # a run folder of someone else does not choose code to run
    result = command("train", "resume=run/checkpoints/last.ckpt", "trainer.max_steps=4")
    assert (result.status, "tasks.py:Counter names code to run" in result.err) == (1, True)


def test_calls_of_tools_are_run_and_the_answer_is_scored(command, tmp_path: Path, monkeypatch) -> None:
    rows = [{"prompt": [{"role": "user", "content": f"{n} + 1?"}], "answer": str(n + 1)} for n in range(16)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    chat = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 8
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chat))
    sizes = (*SMALL[:-2], "model.max_seq_len=512", "precision=fp32")
    assert command("train", "objective=sft", "data.path=chat.jsonl", *sizes, "hydra.run.dir=base").status == 0
    (tmp_path / "base/model/chat_template.jinja").write_text(TEMPLATE)

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base/model")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")

    def scripted(model, prompts, config, *, copies, **options):
        contexts = [tokenizer.decode(row) for row in prompts for _ in range(copies)]
        said = []
        for n, context in enumerate(contexts):
            question = context.rpartition("user\n")[2].partition("?")[0]
            call = json.dumps({"name": "calculate", "arguments": {"expression": question}})
            is_told = "<|im_start|>tool" in context
            told = context.rpartition("tool\n")[2].partition("<|im_end|>")[0] if n % 4 else "nothing"
            text = told if is_told else f"<tool_call>{call}</tool_call>"
            said.append([*tokenizer(text, add_special_tokens=False)["input_ids"], end])
        return said

    monkeypatch.setattr(episodes, "sample_completions", scripted)
    result = command(
        "train", "objective=grpo", "init_from=base/model", "data.path=sums.jsonl", "objective.environment=calculator",
        "objective.group_size=4", "objective.max_new_tokens=80", "data.batch_size=2", "trainer.max_steps=2",
        "trainer.log_every_n_steps=1", "precision=fp32", "hydra.run.dir=run", "callbacks.samples.every_n_steps=1",
        "data.val_batch_size=4", "trainer.limit_val_batches=1",
    )  # fmt: skip
    assert result.status == 0, result.err
    rows = [row for row in table(tmp_path / "run") if row["objective/scores"]]
    assert [float(row["objective/scores"]) for row in rows] == [0.75] * len(rows)
    for name, value in {
        "tool_calls": 1,
        "tool_errors": 0,
        "calls_worked": 1,
        "turns": 2,
        "done": 1,
        "ended": 1,
    }.items():
        assert {float(row[f"objective/{name}"]) for row in rows} == {value}, name
    assert [float(row["policy/ratio"]) for row in rows] == pytest.approx([1.0] * len(rows), abs=1e-6)
    assert "tool\n" in result.out + result.err  # the printed episodes show what the tool answered


def test_a_constructor_that_raises_is_one_line_at_first_and_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("places.py").write_text(
        "class Places:\n    left = 1\n    def __init__(self, n=1):\n        Places.left -= n\n"
        "        if Places.left < 0:\n            raise ValueError('no place left')\n"
        "    def reset(self, row):\n        return 'Hi'\n    def step(self, completion):\n        return ('', 0.0, True)\n"
    )
    with pytest.raises(
        ConfigError, match=r"environment_args: places.py:Places\(n=2\) raised ValueError, no place left"
    ):
        load_environment("places.py:Places", {"n": 2})
    sys.modules["places"].Places.left = 1
    make = load_environment("places.py:Places", {})
    with pytest.raises(
        ConfigError, match=r"environment=places.py:Places: raised ValueError, no place left \(places.py"
    ):
        make()


@pytest.mark.parametrize(
    ("name", "arguments", "error"),
    [
        ("guess", {}, "objective.environment=guess: no environment of that name; name a class as"),
        ("tasks.py:Nobody", {}, "tasks.py:Nobody: cannot be imported"),
        ("tasks.py:Half", {}, "tasks.py:Half: has no step; docs/alignment.md#environments"),
        ("guess_number", {"hgih": 9}, "guess_number takes low, high, guesses, column ("),
        ("guess_number", {"low": 9, "high": 1}, "low must be below high"),
    ],
)
def test_what_is_no_environment_is_refused(
    name: str, arguments: dict, error: str, games: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as raised:
        load_environment(name, arguments)
    assert error in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "error"),
    some([
        ((*GAME[:1], "objective.reward=tasks:reward"), "objective.reward: the environment gives the rewards"),
        (("objective.environment=calculator",), "no column 'answer' with the right answer"),
        ((*GAME[:1], "objective.max_turns=0"), "objective.max_turns must be at least 1, not 0"),
    ]),
)  # fmt: skip
def test_a_mistake_is_one_line(arguments: tuple[str, ...], error: str, games: None, command) -> None:
    result = command("train", *KINDS["grpo"], *SMALL, "data.path=games.jsonl", "objective.max_new_tokens=3", *arguments)
    assert result.status != 0
    assert error in result.err
    assert result.err.strip().splitlines()[-1].startswith("error: ")


def test_options_of_environments_without_one_are_named(games: None, command, tmp_path: Path) -> None:
    (tmp_path / "rewards.py").write_text("def e(prompts, completions, **columns):\n    return [0.0] * len(prompts)\n")
    result = command(
        "train", *KINDS["grpo"], *SMALL, "data.path=games.jsonl", "objective.max_new_tokens=3", "objective.reward=rewards:e",
        "objective.max_turns=2", "trainer.max_steps=1",
    )  # fmt: skip
    assert result.status == 0, result.err
    assert "objective.max_turns=2: has no effect: objective.environment=null" in result.out + result.err
