"""Rewards of completions: any Python function, or a reward model trained here; several with weights."""

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from genai_pl.data.chat import Messages
from genai_pl.errors import CheckpointError, ConfigError
from genai_pl.evaluation.preferences import judged_tokens
from genai_pl.loading import load
from genai_pl.models.scores import scores
from genai_pl.names import Head
from genai_pl.objectives.rows import pad_rows
from genai_pl.peft import share_frozen

Reward = Callable[..., Sequence[float]]


def load_rewards(
    names: Sequence[str], weights: Sequence[float] | None, *, policy: nn.Module, device: torch.device
) -> Reward:
    """The weighted sum of rewards; each is module:function or a reward model's run folder, .ckpt or Hugging Face folder.

    A reward model that is an adapter on the frozen base of the policy is held in memory as its adapter alone.
    """
    if not names:
        raise ConfigError("objective.reward is not set: name a function as module:function, or a reward model")
    weights = [1.0] * len(names) if weights is None else list(weights)
    if len(weights) != len(names):
        raise ConfigError(f"objective.reward_weights has {len(weights)} numbers for {len(names)} rewards")
    rewards = [_function(name) if _names_function(name) else _model(name, policy, device) for name in names]

    def reward(prompts: Sequence[str], completions: Sequence[str], **columns: Sequence[object]) -> list[float]:
        found = [function(prompts, completions, **columns) for function in rewards]
        return [sum(w * float(x) for w, x in zip(weights, row, strict=True)) for row in zip(*found, strict=True)]

    return reward


def _names_function(name: str) -> bool:
    return ":" in name and not Path(name).exists()


def _function(name: str) -> Reward:
    """The function `module:function`, from the working folder or the environment."""
    module, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"objective.reward={name}: cannot be imported ({error})") from None
    if not callable(function):
        raise ConfigError(f"objective.reward={name}: not a function")
    return function


def _model(name: str, policy: nn.Module, device: torch.device) -> Reward:
    """The scores of a reward model, which reads prompt and completion in its own tokens."""
    loaded = load(name, option="objective.reward")
    if loaded.model.config.head is not Head.score:
        raise CheckpointError(f"objective.reward={name}: not a reward model; train one with objective=reward")
    share_frozen(loaded.model, policy)
    model, tokenizer = loaded.model.to(device), loaded.tokenizer
    limit = model.config.max_seq_len

    @torch.no_grad()
    def reward(prompts: Sequence[str | Messages], completions: Sequence[str]) -> list[float]:
        rows = [row[-limit:] for row in judged_tokens(tokenizer, prompts, completions)]
        ids = pad_rows(rows, tokenizer.pad_token_id or 0).to(device)
        segments = pad_rows([[1] * len(row) for row in rows], 0).to(device)
        return scores(model, ids, segments, 1)[:, 0].tolist()

    return reward
