"""Rewards of completions: Python functions and reward models, weighted and summed.

A reward is a callable `reward(prompts, completions, **columns) -> list of numbers`, one number per completion, as
in TRL's GRPOTrainer; columns are further columns of the data, repeated per completion. An entry of
`objective.reward` is `module:function`, `file.py:function`, `module.function`, or the name of a reward model
trained with objective=reward. None instead of a number means "this reward does not apply to this completion".
"""

import importlib.util
import logging
import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn

from genai_pl.data.columns import Place
from genai_pl.data.prompt_tokens import Messages, Tools
from genai_pl.data.steps import split_steps
from genai_pl.data.tool_schemas import parse_tools
from genai_pl.errors import CheckpointError, ConfigError
from genai_pl.evaluation.preferences import reward_tokens
from genai_pl.evaluation.steps import step_scores, step_separator
from genai_pl.loading import Loaded, load
from genai_pl.models.pooling import scores
from genai_pl.models.virtual_tokens import context_of
from genai_pl.modules.reward_calls import call, numbers
from genai_pl.modules.step_rewards import AGGREGATES, DENSE, StepRewards, StepScores
from genai_pl.objectives.collate import pad_rows
from genai_pl.peft import share_frozen
from genai_pl.training.named_objects import make_importable, named_object

log = logging.getLogger(__name__)

Reward = Callable[..., Sequence[float]]
REWARD_ARGUMENTS = ("prompts", "completions")  # of a reward, before the columns of the data
HOW = "name a function as module:function or file.py:function, or a reward model"


def load_rewards(
    names: Sequence[str],
    weights: Sequence[float] | None,
    *,
    uncertainty: float | None = None,
    step_rewards: str = DENSE,
    policy: nn.Module,
    device: torch.device,
) -> Reward:
    """The weighted sum of rewards as one function `(prompts, completions, raw_prompts, **columns) -> list[float]`;
    `StepScores` where a process reward model gives dense rewards.

    names: entries of objective.reward. weights: one number for each, None for all 1. uncertainty: rewards are an
    ensemble, scored by their mean minus this many standard deviations, None for a weighted sum. step_rewards: dense, or what
    makes one reward of those of a process reward model (`step_rewards.AGGREGATES`). policy: the model in
    training; a reward model that is an adapter on the same frozen base shares its weights with it, so that only
    the adapter takes memory. device: of reward models.

    Functions get prompts as text; reward models get `raw_prompts`, text or messages, and apply their own chat
    template. A completion to which no reward applies gets NaN, and the caller drops it from the loss.
    """
    _check_numbers(names, weights, uncertainty)
    # each entry: a function, or a reward model
    weights = [1.0] * len(names) if weights is None else list(weights)
    places = [_locate(name) for name in names]
    rewards = [
        _load_judge(name, policy, device) if place is None else load_function(name, *place)
        for name, place in zip(names, places, strict=True)
    ]
    of_steps = [n for n, reward in enumerate(rewards) if isinstance(reward, ProcessJudge)]
    is_dense = _is_dense(step_rewards, uncertainty, has_steps=bool(of_steps))
    warned: set[str] = set()

    # messages about data or rewards, once per run
    def warn_once(message: str) -> None:
        """Log a warning that this run has not logged yet."""
        if message not in warned:
            warned.add(message)
            log.warning(message)

    def reward(
        prompts: Sequence[str],
        completions: Sequence[str],
        raw_prompts: Sequence[str | Messages] | None = None,
        /,
        **columns: Sequence[object],
    ) -> list[float] | StepScores:
        """Weighted sum of all rewards for each completion; columns of the data come as keywords."""
        for column in columns.keys() & set(REWARD_ARGUMENTS):
            warn_once(f"reward      column {column} of the data is not handed on: an argument of rewards is called so")
        columns = {name: values for name, values in columns.items() if name not in REWARD_ARGUMENTS}
        raw_prompts = prompts if raw_prompts is None else raw_prompts
        # call every reward, then add up row by row
        judges = [
            partial(_score_with_judge, function, raw_prompts) if isinstance(function, Judge) else function
            for function in rewards
        ]
        rewards_given = call(names, judges, prompts, completions, columns)
        steps = {n: rewards_given[n] for n in of_steps}
        for n, given in steps.items():  # one number for each completion
            rewards_given[n] = [AGGREGATES.get(step_rewards, sum)(row.rewards) for row in given]
        columns_of_numbers = [numbers(name, values, prompts) for name, values in zip(names, rewards_given, strict=True)]
        rows = list(zip(*columns_of_numbers, strict=True))
        if uncertainty is None:
            sums = [_weighted_sum(weights, row) for row in rows]
        else:
            sums = [pessimistic_mean(row, uncertainty) for row in rows]
        if any(map(math.isnan, sums)):
            warn_once(
                "reward      no reward applies to some completions (all gave None): nothing is learned from these"
            )
        if not is_dense:
            return sums
        weighted = [[row.weighted(weights[n]) for row in given] for n, given in steps.items()]
        return StepScores(sums, [list(rows) for rows in zip(*weighted, strict=True)])

    return reward


def _is_dense(step_rewards: str, uncertainty: float | None, *, has_steps: bool) -> bool:
    """Whether each step is rewarded by itself; ConfigError for options that do not go with the rewards."""
    if step_rewards != DENSE and not has_steps:
        raise ConfigError(
            f"objective.step_rewards={step_rewards} has no effect: no objective.reward is a process reward model; leave it out"
        )
    is_dense = has_steps and step_rewards == DENSE
    if is_dense and uncertainty is not None:
        raise ConfigError(
            "objective.reward_uncertainty is of whole completions; set objective.step_rewards to min, last, mean or product"
        )
    return is_dense


def _check_numbers(names: Sequence[str], weights: Sequence[float] | None, uncertainty: float | None) -> None:
    """ConfigError for no rewards, and for weights or an uncertainty that do not fit their number."""
    if not names:
        raise ConfigError(f"objective.reward is not set: {HOW}")
    if uncertainty is not None and (weights is not None or len(names) < 2 or uncertainty < 0):
        raise ConfigError(
            f"objective.reward_uncertainty={uncertainty} needs a number of at least 0, two rewards or more and no reward_weights"
        )
    if weights is not None and len(weights) != len(names):
        raise ConfigError(f"objective.reward_weights has {len(weights)} numbers for {len(names)} rewards")


def _weighted_sum(weights: Sequence[float], row: Sequence[float | None]) -> float:
    """Weighted sum of the rewards that apply to one completion; NaN where none does."""
    terms = [weight * value for weight, value in zip(weights, row, strict=True) if value is not None]
    return sum(terms) if terms else math.nan


def pessimistic_mean(row: Sequence[float | None], uncertainty: float) -> float:
    """The mean of an ensemble's rewards minus `uncertainty` standard deviations between them (Eisenstein et al. 2023, 5.1:
    of the ensemble as a population); NaN where none applies.

    >>> pessimistic_mean([1.0, 3.0, None], 0.5)
    1.5
    """
    values = [value for value in row if value is not None]
    if not values:
        return math.nan
    mean = sum(values) / len(values)
    return mean - uncertainty * math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))


def _locate(name: str) -> tuple[str, str] | None:
    """Module (or .py file) and function name of an entry; None for the name of a model. ConfigError for an entry
    that is neither.

    An existing path is always a model. A dotted name without a slash can be both a module and a run: it must be
    importable.
    """
    # a file, a path that exists, module:function, then a dotted name
    if name.endswith(".py") and not Path(name).is_dir():
        raise ConfigError(f"objective.reward={name}: name the function in the file too, as {name}:FUNCTION")
    if Path(name).exists():
        return None
    if ":" in name:
        module, _, attribute = name.rpartition(":")
        return module, attribute
    if "/" in name or not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", name):
        return None
    module, _, attribute = name.rpartition(".")
    make_importable(Path.cwd())
    try:
        exists = importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        exists = False
    if not exists:
        raise ConfigError(f"objective.reward={name}: no module {module} to import, nor such a run or folder; {HOW}")
    return module, attribute


def load_function(name: str, module: str, attribute: str, *, option: str = "objective.reward") -> Callable[..., object]:
    """The function of a module or a .py file; ConfigError for what cannot be imported or called.

    name: as it was given in `option`, for errors.
    """
    function = named_object(f"{option}={name}", module, attribute)
    if not callable(function):
        raise ConfigError(f"{option}={name}: not a function")
    return function


class Judge:
    """A reward model with its own tokenizer: it reads prompt and completion as in its training, not in the
    policy's tokens.

    loaded: the reward model, `head=score`. device: where it runs.
    """

    def __init__(self, loaded: Loaded, device: torch.device) -> None:
        self.model, self.tokenizer = loaded.model.to(device), loaded.tokenizer
        self.context = context_of(self.model)

    @torch.no_grad()
    def __call__(
        self,
        prompts: Sequence[str | Messages],
        completions: Sequence[str],
        tools: Sequence[object] | None = None,
    ) -> list[float]:
        """Scores of completions, one float each.

        prompts: text or messages. completions: the text after each. tools: the cells of the data's `tools`
        column, for chat templates that print them. Rows longer than the model's context lose tokens on the
        left.
        """
        tools_of_prompts = _parsed_tools(prompts, tools)
        # pad to one batch: (B, T) ids, segment 1 where a token is real
        limit, device = self.context, self.model.embed.weight.device
        rows = [row[-limit:] for row in reward_tokens(self.tokenizer, prompts, completions, tools_of_prompts)]
        ids = pad_rows(rows, self.tokenizer.pad_token_id or 0).to(device)
        segments = pad_rows([[1] * len(row) for row in rows], 0).to(device)
        return scores(self.model, ids, segments, 1)[:, 0].tolist()


class ProcessJudge(Judge):
    """A process reward model, which scores each step of a completion; what ends a step is the separator of its training."""

    def __init__(self, loaded: Loaded, device: torch.device, separator: str) -> None:
        super().__init__(loaded, device)
        self.separator = separator

    def __call__(
        self,
        prompts: Sequence[str | Messages],
        completions: Sequence[str],
        tools: Sequence[object] | None = None,
    ) -> list[StepRewards]:
        """The probabilities that the steps of completions are correct, and where the steps end in the texts."""
        answers = [split_steps(text, self.separator) for text in completions]
        found = step_scores(
            *(self.model, self.tokenizer, prompts, [[step for step, _ in answer] for answer in answers]),
            separator=self.separator,
            max_length=self.context,
            tools=_parsed_tools(prompts, tools),
        )
        return [StepRewards([end for _, end in row], own) for row, own in zip(answers, found, strict=True)]


def _parsed_tools(prompts: Sequence[str | Messages], tools: Sequence[object] | None) -> list[Tools]:
    """The tools of each prompt from the cells of the column `tools`, none of a text."""
    cells = [None] * len(prompts) if tools is None else tools
    return [
        () if isinstance(prompt, str) else parse_tools(cell, Place("data.path", n, "tools"))
        for n, (prompt, cell) in enumerate(zip(prompts, cells, strict=True), start=1)
    ]


def _load_judge(name: str, policy: nn.Module, device: torch.device) -> Judge:
    """The reward model of a name, its frozen base shared with the policy; CheckpointError for a model without a
    score head.
    """
    loaded = load(name, option="objective.reward")
    if (separator := step_separator(loaded.model)) is not None:
        share_frozen(loaded.model, policy)
        return ProcessJudge(loaded, device, separator)
    if not loaded.model.config.is_reward:
        raise CheckpointError(
            f"objective.reward={name}: not a reward model; train one with objective=reward or process_reward"
        )
    share_frozen(loaded.model, policy)
    return Judge(loaded, device)


def _score_with_judge(
    judge: Judge,
    raw_prompts: Sequence[str | Messages],
    prompts: Sequence[str],
    completions: Sequence[str],
    *,
    tools: Sequence[object] | None = None,
    **_: object,
) -> list[float]:
    """A judge with the signature of a reward function: raw prompts in place of their text, all columns but `tools`
    ignored.
    """
    return judge(raw_prompts, completions, tools)
