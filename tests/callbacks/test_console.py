"""Console lines: aligned columns, and durations that people can read."""

import json
from pathlib import Path

import pytest

from genai_pl.callbacks import Console, duration
from genai_pl.modules import CausalLMModule
from genai_pl.modules.grpo import GRPOModule
from genai_pl.modules.kto import KTOModule
from genai_pl.modules.ppo import PPOModule
from genai_pl.modules.preference import PreferenceModule
from genai_pl.modules.reward import RewardModule
from genai_pl.modules.sft import SFTModule
from tests.conftest import TINY


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0s"), (42, "42s"), (59.6, "1m00s"), (185, "3m05s"), (3599.7, "1h00m"), (7805, "2h10m")]
)
def test_durations_read_as_people_write_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_rows_are_aligned_under_their_headings(capsys: pytest.CaptureFixture[str]) -> None:
    from types import SimpleNamespace

    console = Console()
    console._trainer = SimpleNamespace(max_steps=100)
    metrics = {"train/loss": 2.5, "train/lr": 1e-3, "train/grad_norm": 0.5, "train/tokens_per_sec": 12345.6}
    console.show(1, metrics)
    console.show(10, metrics)
    heading, first, second = capsys.readouterr().out.splitlines()
    assert len(heading) == len(first) == len(second)
    assert first.split()[:5] == ["1", "2.5000", "1.00e-03", "0.500", "12,346"]
    for name, value in (("loss", "2.5000"), ("lr", "1.00e-03"), ("tok/s", "12,346")):
        assert heading.index(name) + len(name) == first.index(value) + len(value)


MODULES = {  # headings between the step and the learning rate
    CausalLMModule: ["loss"],
    SFTModule: ["loss"],
    PreferenceModule: ["loss", "margin", "accuracy"],
    RewardModule: ["loss", "margin", "accuracy"],
    KTOModule: ["loss", "margin", "KL"],
    GRPOModule: ["reward", "KL", "length"],
    PPOModule: ["reward", "KL", "length"],
}


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_a_table_shows_what_the_objective_is_about(module: type, capsys: pytest.CaptureFixture[str]) -> None:
    from types import SimpleNamespace

    console = Console()
    console._trainer = SimpleNamespace(max_steps=100)
    console.on_train_start(SimpleNamespace(global_step=0, is_global_zero=True), module)
    console.show(10, {**{column.metric: 0.25 for column in module.columns}, "train/loss": 0.25, "train/lr": 1e-3})
    heading, row = capsys.readouterr().out.splitlines()
    assert heading.split() == ["step", *MODULES[module], "lr", "left"]
    assert len(heading) == len(row)


def test_the_metrics_of_a_table_are_those_that_runs_log(command, tmp_path: Path) -> None:
    rows = {
        "pairs": [{"prompt": f"{n}", "chosen": "yes", "rejected": "no"} for n in range(20)],
        "prompts": [{"prompt": f"{n}"} for n in range(20)],
        "liked": [{"prompt": f"{n}", "completion": "yes", "label": n % 2 == 0} for n in range(20)],
    }
    for name, table in rows.items():
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
    Path("judge.py").write_text(
        "def long(prompts, completions, **columns):\n    return [len(c) for c in completions]\n"
    )
    policy = ("objective.reward=judge.py:long", "objective.max_new_tokens=4", "data.path=prompts.jsonl")
    runs = {
        PreferenceModule: ("objective=dpo", "data.path=pairs.jsonl"),
        RewardModule: ("objective=reward", "data.path=pairs.jsonl"),
        KTOModule: ("objective=kto", "data.path=liked.jsonl"),
        GRPOModule: ("objective=grpo", *policy),
        PPOModule: ("objective=ppo", "objective.minibatch_size=4", *policy),
    }
    for module, options in runs.items():
        result = command("train", *TINY, "trainer.max_steps=1", "callbacks.export=false", *options)
        assert result.status == 0, result.err
        heading = next(line for line in result.out.splitlines() if line.split()[:1] == ["step"] and "left" in line)
        assert heading.split()[1 : 1 + len(MODULES[module])] == MODULES[module]
