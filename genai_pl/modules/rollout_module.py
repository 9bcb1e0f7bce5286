"""Rollout modules: a policy that generates completions in training, has them scored, and measures how likely they were.

GRPO and PPO derive from it by way of `PolicyGradientModule`. What is here needs no gradient: sampling, rewards,
log-probabilities under policy and reference, and the validation metrics made of them.
"""

import logging
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from genai_pl.config.generation import GenerationConfig
from genai_pl.data.turns import Turns
from genai_pl.environments.episode import Rules
from genai_pl.errors import ConfigError
from genai_pl.models import Model
from genai_pl.modules.base import BaseModule, Batch, Metrics
from genai_pl.modules.episodes import play_episodes
from genai_pl.modules.preference import shared_prompt_inputs, supports_shared_prompts, token_logprobs
from genai_pl.modules.reference import Reference
from genai_pl.modules.rollout import (
    Example,
    Experience,
    Reward,
    Rollout,
    ScoredRollout,
    gather_tokens,
    generate_rollout,
    micro_batches,
    restore_order,
)
from genai_pl.modules.rollout_policy import rollout_policy
from genai_pl.modules.step_rewards import AGGREGATES, DENSE, StepScores, step_tensors
from genai_pl.objectives import SpecialTokens, token_entropy
from genai_pl.objectives.grpo import overlong_penalty
from genai_pl.objectives.prompts import PromptCollator

log = logging.getLogger(__name__)

Means = dict[str, tuple[Tensor, float | Tensor]]  # (sum, count) by metric name; both are summed over ranks first
Decode = Callable[[Sequence[int]], str]
SHOWN = 4  # completions of a rollout that are printed


class RolloutModule(BaseModule):
    """A policy whose completions of prompts are scored by a reward function; a subclass learns from them.

    vocabulary: special tokens; `end` or the model's eos_token_ids must exist, or completions could not end
    seed: of sampling, combined with step and rank
    reward: name or names of reward functions, reward models included; `reward_weights` weighs several
    group_size: completions of each prompt in training
    micro_batch_size: completions in one forward pass, None for all; changes memory, not results
    max_new_tokens: longest completion, in tokens
    temperature: of sampling
    missing_eos_penalty: subtracted from the score of a completion without an end token
    overlong_buffer: last tokens of max_new_tokens over which a penalty grows from 0 to 1 (DAPO), None for no penalty
    length_penalty: subtracted from the score for each token of a completion
    reward_uncertainty: rewards are an ensemble, scored by their mean minus this many standard deviations; None: a sum
    step_rewards: of a process reward model: dense (each step is rewarded at its last token) or what makes one reward of them
    environment: module:Class of an environment, in which the policy acts for at most `max_turns` completions; it gives the
        rewards. environment_args: of the class. tool_timeout: seconds of one call of a tool.

    `use_reward` gives the reward function itself, which needs the tokenizer.
    """

    shapes = ("decoder",)
    data_kind = "prompts"
    needs_reward = True

    def __init__(
        self,
        model: Model,
        *,
        vocabulary: SpecialTokens,
        seed: int,
        optimizer: object,
        schedule: object,
        reward: str | list[str] | None,
        reward_weights: list[float] | None,
        group_size: int,
        micro_batch_size: int | None,
        max_new_tokens: int,
        temperature: float,
        missing_eos_penalty: float,
        overlong_buffer: int | None,
        length_penalty: float,
        reward_uncertainty: float | None,
        step_rewards: str = DENSE,
        environment: str | None = None,
        environment_args: Mapping[str, object] | None = None,  # of the class, for whoever makes it
        max_turns: int = 1,
        tool_timeout: float = 5.0,
    ) -> None:
        super().__init__(model, optimizer=optimizer, schedule=schedule)
        if vocabulary.end is None and not model.config.eos_token_ids:
            raise ConfigError("the tokenizer has no end token: completions could not end")
        sizes = {"group_size": group_size, "micro_batch_size": micro_batch_size, "max_new_tokens": max_new_tokens}
        sizes["max_turns"] = max_turns
        if step_rewards not in (DENSE, *AGGREGATES):
            raise ConfigError(f"objective.step_rewards={step_rewards} is not one of {', '.join((DENSE, *AGGREGATES))}")
        for name, value in sizes.items():
            if value is not None and value < 1:
                raise ConfigError(f"objective.{name} must be at least 1, not {value}")
        if overlong_buffer is not None and not 0 < overlong_buffer <= max_new_tokens:
            raise ConfigError(
                f"objective.overlong_buffer must be from 1 to objective.max_new_tokens={max_new_tokens}, not "
                f"{overlong_buffer}: type objective.overlong_buffer={max(1, max_new_tokens // 5)}, a fifth as in DAPO, or null"
            )
        if overlong_buffer is not None and environment is not None:
            raise ConfigError(
                "objective.overlong_buffer is of single completions; set it to null beside an environment"
            )
        self.collator = PromptCollator(vocabulary=vocabulary, max_new_tokens=max_new_tokens, seed=seed)
        self.vocabulary, self.seed = vocabulary, seed
        self.group_size, self.micro_batch_size = group_size, micro_batch_size
        self.share_prompts = group_size > 1 and supports_shared_prompts(model)
        self.sampling = GenerationConfig(max_new_tokens=max_new_tokens, temperature=temperature)
        self.missing_eos_penalty, self.length_penalty = missing_eos_penalty, length_penalty
        self.overlong_buffer = overlong_buffer
        self.examples: list[Example] = []  # of the last rollout
        self.reference = Reference(model)
        self.environment_name, self.tool_timeout = environment, tool_timeout
        self.max_turns = max_turns if environment else 1
        self.environment: Callable[[], object] | None = None  # these two from `use_environment`
        self.turns: Turns
        self.reward_names = [reward] if isinstance(reward, str) else list(reward or ())
        self.reward_weights, self.reward_uncertainty = reward_weights, reward_uncertainty
        self.step_rewards = step_rewards
        self.reward: Reward  # these three from `use_reward`
        self.decode: Decode
        self.clip_norm: float | None = None

    def use_environment(self, environment: Callable[[], object], turns: Turns) -> None:
        """Act in environments, each made by a call of the function; turns: renders prompts and observations."""
        self.environment, self.turns = environment, turns

    def use_reward(self, reward: Reward | None, *, decode: Decode, clip_norm: float | None = None) -> None:
        """Set the reward function, the decoding of tokens for it, and the largest gradient norm.

        The norm is set here because Lightning's Trainer clips in automatic optimization only.
        """
        self.reward, self.decode, self.clip_norm = reward, decode, clip_norm

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Sample one completion of each prompt, from a generator that depends on the batch only, and add up its metrics."""
        generator = torch.Generator(self.device).manual_seed(self.seed + batch_idx)
        scored_rollout = self.generate_and_score(batch, 1, generator)
        rollout, kl = scored_rollout.rollout, self.kl_to_reference(scored_rollout.rollout)
        if batch_idx == 0:
            self.examples = scored_rollout.examples(kl, SHOWN)
        sums = {
            "scores": scored_rollout.scores.nansum(),
            "scores/scored": (~scored_rollout.scores.isnan()).sum(),
            "kl": kl.sum(),
            "response_length": rollout.mask.sum(),
            "ended": rollout.ended.sum(),
            "targets": batch["targets"],
        }
        own = {name: (values.nansum(), (~values.isnan()).sum()) for name, values in rollout.metrics.items()}
        for name, (total, n) in {**own, **self.scores_by_source(batch, scored_rollout.scores)}.items():
            sums |= {name: total, f"{name}/scored": n}
        for name, value in sums.items():
            self.val_sums[name] = self.val_sums.get(name, 0) + value.detach().double()

    def summarize(self, sums: Metrics, targets: Tensor) -> Metrics:
        """Means over all completions; scores and numbers of episodes over those that have one, and left out where none has."""
        names = [name.removesuffix("/scored") for name in sums if name.endswith("/scored")]
        own = {name: (sums.pop(name), sums.pop(f"{name}/scored")) for name in names}
        means = {name: total / count for name, (total, count) in own.items() if count > 0}
        return {**super().summarize(sums, targets), **means}

    def scores_by_source(self, batch: Batch, scores: Tensor) -> Means:
        """The scores of each source of a mixture as sums with counts; scores: (N,), N / B of each prompt of the batch."""
        if not self.source_names:
            return {}
        sources = batch["sources"].to(scores.device).repeat_interleave(len(scores) // len(batch["sources"]))
        rows = {name: scores[sources == k] for k, name in enumerate(self.source_names)}
        return {f"scores/{name}": (own.nansum(), (~own.isnan()).sum()) for name, own in rows.items()}

    def generate_and_score(self, batch: Batch, copies: int, generator: torch.Generator) -> ScoredRollout:
        """Completions of each prompt of a batch with their scores (N,), nan where no reward applies.

        The `copies` completions of a prompt are neighbours. The reward function receives texts without special tokens,
        the prompts as the data has them (text or messages), and the other columns of their rows by name. ConfigError
        where it does not return one number per completion.
        """
        ends = {*self.model.config.eos_token_ids, self.vocabulary.end} - {None}
        options = {"ends": ends, "pad": self.vocabulary.pad, "generator": generator, "copies": copies}
        options["share_prompts"] = self.share_prompts and copies > 1
        if self.environment is not None:
            return self._play(batch, options)
        # prompts and columns once per completion
        prompts = [prompt for prompt in batch["prompts"] for _ in range(copies)]
        columns = [row for row in batch["columns"] for _ in range(copies)]
        raw_prompts = [prompt for prompt in batch["raw_prompts"] for _ in range(copies)]  # text or messages
        # sample
        with self.unsharded_model(), rollout_policy(self.model, self.sampling.max_new_tokens) as policy:
            rollout = generate_rollout(policy, batch["prompts"], self.sampling, **options)
        # score
        without_end = [row[:-1] if row[-1] in ends else row for row in rollout.completions]  # an end token is no text
        prompt_texts, completion_texts = ([self.decode(row) for row in rows] for rows in (prompts, without_end))
        extra = {name: [row[name] for row in columns] for name in columns[0] if name != "prompt"}
        given = self.reward(prompt_texts, completion_texts, raw_prompts, **extra)
        if isinstance(given, StepScores):
            tensors = step_tensors(rollout.completions, given.steps, self.decode, rollout.mask.shape[1])
            rewards_of_steps, step_ends = (tensor.to(self.device) for tensor in tensors)
            rollout, given = rollout._replace(turn_rewards=rewards_of_steps, step_ends=step_ends), given.scores
        rewards = torch.as_tensor(given, dtype=torch.float32)
        if rewards.shape != (len(prompts),):
            raise ConfigError(f"objective.reward gave {tuple(rewards.shape)} numbers for {len(prompts)} completions")
        if rewards.isnan().all():
            log.warning("reward      none applies to the %s completions of a batch: they teach nothing", len(rewards))
        scores = rewards.to(self.device) - self.penalties(rollout)
        return ScoredRollout(rollout, prompt_texts, completion_texts, scores)

    def _play(self, batch: Batch, options: Mapping[str, object]) -> ScoredRollout:
        """Episodes of each prompt of a batch, with the sums of their rewards as scores."""
        rules = Rules(
            f"objective.environment={self.environment_name}",
            self.turns,
            self.max_turns,
            self.sampling.max_new_tokens,
            self.collator.seq_len or self.model.config.max_seq_len,
            self.tool_timeout,
        )
        pairs = zip(batch["columns"], batch["raw_prompts"], strict=True)
        rows = [{**columns, "prompt": prompt} for columns, prompt in pairs]
        longest = self.max_turns * self.sampling.max_new_tokens
        with self.unsharded_model(), rollout_policy(self.model, longest) as policy:
            options = {**options, "decode": self.decode}
            rollout, prompts = play_episodes(policy, rows, self.environment, rules, self.sampling, **options)
        scores = rollout.turn_rewards.sum(1) - self.penalties(rollout)
        texts = [[self.decode(row) for row in rows] for rows in (prompts, rollout.completions)]
        return ScoredRollout(rollout, *texts, scores)

    def penalties(self, rollout: Rollout) -> Tensor:
        """What is subtracted from the rewards of completions, (N,): for length, and for a missing end token."""
        lengths = rollout.mask.sum(1)
        penalties = self.missing_eos_penalty * ~rollout.ended + self.length_penalty * lengths
        if self.overlong_buffer is None:
            return penalties
        longest = self.sampling.max_new_tokens * self.max_turns
        return penalties - overlong_penalty(lengths, longest=longest, buffer=self.overlong_buffer)

    def kl_to_reference(self, rollout: Rollout) -> Tensor:
        """Log-probability of each completion under the policy minus that under the reference, (N,), in nats.

        The mean over samples of the policy estimates its KL divergence from the reference; a single value may be
        negative.
        """
        outputs = self.rollout_logprobs(rollout)
        return torch.where(rollout.mask, outputs["old_logprobs"] - outputs["reference_logprobs"], 0).sum(1)

    @torch.no_grad()
    def rollout_logprobs(self, rollout: Rollout, *, of_policy: bool = True) -> Experience:
        """Values (N, L) of the completion tokens: `old_logprobs`, `reference_logprobs`, `entropy`, and `extra_outputs`.

        of_policy: False for the reference's alone, where the pass that learns measures the policy.

        "Old" is the policy that generated the rollout: it is measured before the first update, by a forward pass like
        those of training, because log-probabilities taken while sampling differ by the rounding of another kernel, and
        the ratio new / old would not start at 1. Masked positions hold values of other tokens.
        """
        rows = {**rollout.batch, "token_positions": rollout.token_positions}
        row_indices, parts = [], []
        for indices, micro_batch in micro_batches(rows, self.rows_at_once(rows)):
            outputs: Experience = {}
            if of_policy:
                hidden = self.features(micro_batch)
                outputs["entropy"] = self.entropy(hidden, micro_batch["labels"])
                outputs |= self.extra_outputs(micro_batch, hidden)
                outputs["old_logprobs"] = token_logprobs(self.model, micro_batch, hidden=hidden)
            with self.reference.of(self.model) as model:
                outputs["reference_logprobs"] = token_logprobs(model, micro_batch)
            row_indices.append(indices)
            parts.append({name: gather_tokens(x, micro_batch["token_positions"]) for name, x in outputs.items()})
        return restore_order(row_indices, parts)

    def features(self, micro_batch: Experience) -> Tensor:
        """Hidden states (R, T, C) of rows under the policy."""
        return self.model.features(
            micro_batch["input_ids"], micro_batch["segment_ids"], **shared_prompt_inputs(micro_batch)
        )

    def entropy(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Entropy of the policy's prediction at each label (R, T), in nats, 0 elsewhere.

        hidden: (R, T, C), the features of those rows
        """
        head, model = self.model.lm_head, self.model
        options = {"bias": head.bias, "softcap": model.config.logit_softcap}
        return token_entropy(model.to_head(hidden), head.weight, labels, **options)

    def describe(self, rollout: Rollout, scores: Tensor, kl: Tensor, entropy: Tensor) -> Means:
        """Metrics of a rollout as sums with counts: scores (N,), kl (N,), entropy (N, L)."""
        n, tokens = len(scores), rollout.mask.sum()
        own = {f"objective/{k}": (x.nansum(), (~x.isnan()).sum()) for k, x in rollout.metrics.items()}
        return {
            **own,
            "objective/scores": (scores.nansum(), (~scores.isnan()).sum()),
            "objective/kl": (kl.sum(), n),
            "objective/entropy": (torch.where(rollout.mask, entropy, 0).sum(), tokens),
            "objective/response_length": (tokens, n),
            "objective/ended": (rollout.ended.sum(), n),
        }

    def extra_outputs(self, micro_batch: Experience, hidden: Tensor) -> Experience:
        """Further values of the policy's states, (R, T) by name; PPO adds `values`. hidden (R, T, C) are its features."""
        return {}

    def rows_at_once(self, rows: Experience) -> int:
        """Rows of one forward pass: micro_batch_size completions, but at least one row."""
        n = len(rows["input_ids"])
        return n if self.micro_batch_size is None else max(1, self.micro_batch_size * n // len(rows["token_positions"]))
