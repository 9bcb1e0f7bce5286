"""Tokens per second count what the model read: the rows of a rollout, while the batch keeps its prompts."""

import csv
import json
from pathlib import Path

import pytest
import torch

from genai_pl.callbacks import Monitor
from genai_pl.modules import rollout_module
from tests.conftest import TINY


def test_a_rollout_counts_its_own_tokens_and_leaves_the_batch_as_it_was(
    tmp_path: Path, command, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"prompt": f"{i} is "} for i in range(16)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "letters.py").write_text(
        "def e(prompts, completions):\n    return [c.count('e') for c in completions]\n"
    )
    rollouts, n_rollout_tokens = [], 0
    generate, on_batch_end = rollout_module.generate_rollout, Monitor.on_train_batch_end

    def recorded(*args, **kwargs):
        rollouts.append(generate(*args, **kwargs))
        return rollouts[-1]

    def checked(self, trainer, module, outputs, batch, batch_idx):
        nonlocal n_rollout_tokens
        assert [ids[: len(p)].tolist() for ids, p in zip(batch["input_ids"], batch["prompts"], strict=True)] == [
            prompt.tolist() for prompt in batch["prompts"]
        ]
        assert batch["input_ids"].shape[1] == max(map(len, batch["prompts"]))
        n_rollout_tokens += rollouts[-1].batch["input_ids"].numel()
        on_batch_end(self, trainer, module, outputs, batch, batch_idx)
        assert self.tokens_seen == n_rollout_tokens

    monkeypatch.setattr(rollout_module, "generate_rollout", recorded)
    monkeypatch.setattr(Monitor, "on_train_batch_end", checked)
    options = ("objective=grpo", "objective.group_size=2", "objective.max_new_tokens=4", "objective.reward=letters:e")
    result = command("train", *TINY, *options, "data.path=prompts.jsonl", "hydra.run.dir=run")
    assert result.status == 0, result.err
    with Path("run/metrics.csv").open() as file:
        seen = [float(row["train/tokens_seen"]) for row in csv.DictReader(file) if row["train/tokens_seen"]]
    assert torch.tensor(seen).diff().min() > 0
    assert seen[-1] == n_rollout_tokens
