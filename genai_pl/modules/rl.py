"""Reinforcement learning on completions: write, judge, learn from it in minibatches, write again."""

from abc import abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from genai_pl.errors import ConfigError
from genai_pl.models import Model
from genai_pl.modules.base import BaseModule, Batch, Metrics
from genai_pl.modules.preference import shared_beginning, shares_beginnings, token_logprobs
from genai_pl.modules.reference import Reference
from genai_pl.modules.rollout import Example, Judged, Reward, Rollout, at_places, write
from genai_pl.objectives import Vocabulary, token_entropy
from genai_pl.objectives.prompts import PromptCollator
from genai_pl.specs import GenerationConfig

Experience = dict[str, Tensor]  # what minibatches are cut from: (R, ...), or (N, ...) with N / R completions to a row
Means = dict[str, tuple[Tensor, float | Tensor]]  # sums with how many they are of, each to be added up over ranks
SHOWN = 4  # completions of a rollout that people may read


class RLModule(BaseModule):
    """One batch of prompts is one rollout and `epochs` passes over it, each of as many optimizer steps as it has minibatches.

    What is drawn depends on the seed, the step and the rank alone, so that a resumed run draws the same.
    """

    shapes = ("decoder",)
    data_kind = "prompts"
    needs_reward = True
    critic_name: str | None = None  # a model of its own that judges states; set by whoever builds the run

    def __init__(
        self,
        model: Model,
        *,
        vocabulary: Vocabulary,
        seed: int,
        optimizer: object,
        schedule: object,
        reward: str | list[str] | None,
        reward_weights: list[float] | None,
        group_size: int,
        epochs: int,
        minibatch_size: int | None,
        max_new_tokens: int,
        temperature: float,
        missing_eos_penalty: float,
        max_kl: float | None,
    ) -> None:
        super().__init__(model, optimizer=optimizer, schedule=schedule)
        if vocabulary.end is None:
            raise ConfigError("the tokenizer has no end token: completions could not end")
        for name, value in {"group_size": group_size, "epochs": epochs, "max_new_tokens": max_new_tokens}.items():
            if value < 1:
                raise ConfigError(f"objective.{name} must be at least 1, not {value}")
        if max_kl is not None and not max_kl > 0:
            raise ConfigError(f"objective.max_kl must be above 0, not {max_kl}")
        self.automatic_optimization = False
        self.collator = PromptCollator(vocabulary=vocabulary, seed=seed)
        self.vocabulary, self.seed = vocabulary, seed
        self.group_size, self.epochs, self.minibatch_size = group_size, epochs, minibatch_size
        whole_groups = group_size > 1 and (minibatch_size or group_size) % group_size == 0
        self.share_prompts = whole_groups and shares_beginnings(model)
        self.sampling = GenerationConfig(max_new_tokens=max_new_tokens, temperature=temperature)
        self.missing_eos_penalty, self.max_kl = missing_eos_penalty, max_kl
        self.examples: list[Example] = []  # of the last rollout
        self.reference = Reference(model)
        self.reward_names = [reward] if isinstance(reward, str) else list(reward or ())
        self.reward_weights = reward_weights
        self.clip_norm: float | None = None  # set with the Trainer, which clips in automatic optimization only
        self.reward: Reward  # set by whoever builds the run
        self.decode: object  # tokens to text, likewise

    @abstractmethod
    def learn(self, rollout: Rollout, scores: Tensor) -> tuple[Experience, Means]:
        """What minibatches are made of, `kl` (N,) among it, and means to be logged."""

    @abstractmethod
    def loss(self, part: Experience) -> tuple[Tensor, Tensor, Metrics]:
        """The loss of a minibatch as a sum, by what it is divided over all ranks, and sums over its tokens."""

    def step(self, batch: Batch) -> Metrics:
        raise NotImplementedError("rollouts are learned from in training_step")

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        judged = self.write_and_judge(batch, self.group_size, self._generator())
        batch["input_ids"] = judged.rollout.batch["input_ids"]  # what the monitor counts
        experience, means = self.learn(judged.rollout, judged.scores)
        self.examples = judged.examples(experience["kl"], SHOWN)
        optimizer, schedule = self.optimizers(), self.lr_schedulers()
        sums: Metrics = {}
        for part in self._minibatches(experience):
            loss, divisor, found = self.loss(part)
            if sums and self._too_far(found["policy/approxkl"], part["mask"]):
                break
            divisor = self._over_ranks(divisor.float()).clamp(min=1)
            optimizer.zero_grad()
            self.manual_backward(loss * (self.trainer.world_size / divisor))
            self.window = {"loss": loss.detach()}  # with the norm of the gradient, what must be finite
            self.configure_gradient_clipping(optimizer.optimizer, self.clip_norm)
            optimizer.step()
            schedule.step()
            found |= {"loss": loss.detach() / divisor, "tokens": part["mask"].sum(), "updates": loss.new_ones(())}
            sums = {name: sums.get(name, 0) + value for name, value in found.items()}
        self._log_later(means, sums)

    def _log_later(self, means: Means, sums: Metrics) -> None:
        tokens, updates, loss = sums.pop("tokens"), sums.pop("updates"), sums.pop("loss")
        self.means = {**means, **{name: (value, tokens) for name, value in sums.items()}}
        self.means["loss"] = loss, updates / self.trainer.world_size  # each rank has a part of the sum
        self.means["policy/updates"] = updates, 1

    def _too_far(self, kl: Tensor, mask: Tensor) -> bool:
        """Whether the policy has moved so far from the one that wrote that the rollout teaches it no more."""
        if self.max_kl is None:
            return False
        return bool(self._over_ranks(kl) > self.max_kl * self._over_ranks(mask.sum()))

    def step_metrics(self) -> dict[str, float]:
        """Means over the last rollout, over all ranks."""
        parts = [[float(part) for part in mean] for mean in self.means.values()]
        sums, counts = self._over_ranks(torch.tensor(parts, dtype=torch.float64, device=self.device)).unbind(1)
        means = dict(zip(self.means, (sums / counts.clamp(min=1)).tolist(), strict=True))
        return {k if "/" in k else f"train/{k}": v for k, v in means.items()}

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        generator = torch.Generator(self.device).manual_seed(self.seed + batch_idx)
        judged = self.write_and_judge(batch, 1, generator)
        rollout, kl = judged.rollout, self.distance(judged.rollout)
        if batch_idx == 0:
            self.examples = judged.examples(kl, SHOWN)
        found = {
            "scores": judged.scores.sum(),
            "kl": kl.sum(),
            "response_length": rollout.mask.sum(),
            "ended": rollout.ended.sum(),
            "targets": batch["targets"],
        }
        for name, value in found.items():
            self.val_sums[name] = self.val_sums.get(name, 0) + value.detach().double()

    def write_and_judge(self, batch: Batch, copies: int, generator: torch.Generator) -> Judged:
        """Completions of each prompt, next to each other, and their scores (N,)."""
        prompts = [prompt for prompt in batch["prompts"] for _ in range(copies)]
        columns = [row for row in batch["columns"] for _ in range(copies)]
        ends = {"end": self.vocabulary.end, "pad": self.vocabulary.pad}
        with self.whole_model():
            rollout = write(
                self.model,
                batch["prompts"],
                self.sampling,
                copies=copies,
                share_prompts=self.share_prompts and copies > 1,
                generator=generator,
                **ends,
            )
        asked, said = ([self.decode(row) for row in rows] for rows in (prompts, rollout.completions))
        extra = {name: [row[name] for row in columns] for name in columns[0] if name not in ("prompt", "completions")}
        given = torch.as_tensor(self.reward(asked, said, **extra), dtype=torch.float32)
        if given.shape != (len(prompts),):
            raise ConfigError(f"objective.reward gave {tuple(given.shape)} numbers for {len(prompts)} completions")
        scores = given.to(self.device) - self.missing_eos_penalty * ~rollout.ended
        return Judged(rollout, asked, said, scores)

    def distance(self, rollout: Rollout) -> Tensor:
        """Log-probability of each completion under the policy minus that under the reference, (N,)."""
        policy, reference = self.logprobs(rollout)
        return torch.where(rollout.mask, policy - reference, 0).sum(1)

    @torch.no_grad()
    def features(self, rollout: Rollout) -> Tensor:
        """What the policy makes of the rows, (R, T, C)."""
        batch = rollout.batch
        return self.model.features(batch["input_ids"], batch["segment_ids"], **shared_beginning(batch))

    def entropy(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Of what the policy predicts at each label, summed; hidden (R, T, C) are its features."""
        head, model = self.model.lm_head, self.model
        options = {"bias": head.bias, "softcap": model.config.logit_softcap}
        return token_entropy(model.to_head(hidden), head.weight, labels, **options).sum()

    @torch.no_grad()
    def describe(self, rollout: Rollout, scores: Tensor, kl: Tensor, hidden: Tensor) -> Means:
        """Means over a rollout: kl is (N,), hidden (R, T, C) are the policy's features."""
        n, tokens = len(scores), rollout.mask.sum()
        return {
            "objective/scores": (scores.sum(), n),
            "objective/kl": (kl.sum(), n),
            "objective/entropy": (self.entropy(hidden, rollout.batch["labels"]), tokens),
            "objective/response_length": (tokens, n),
            "objective/ended": (rollout.ended.sum(), n),
        }

    def logprobs(self, rollout: Rollout, *, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Those of the policy and of the reference for each token that was drawn, (N, L).

        hidden (R, T, C) are the policy's features, if somebody has them.
        """
        with torch.no_grad():
            policy = token_logprobs(self.model, rollout.batch, hidden=hidden)
        with self.reference.of(self.model) as model:
            reference = token_logprobs(model, rollout.batch)
        return at_places(policy, rollout.places), at_places(reference, rollout.places)

    def _generator(self) -> torch.Generator:
        number = (self.seed * 1_000_003 + self.trainer.global_step) * 1_009 + self.global_rank
        return torch.Generator(self.device).manual_seed(number)

    def _minibatches(self, experience: Experience) -> Iterator[Experience]:
        """`epochs` passes in drawn orders, the same on every rank."""
        n, completions = len(experience["input_ids"]), len(experience["mask"])
        size = (self.minibatch_size or completions) * n // completions
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.trainer.global_step)
        for _ in range(self.epochs):
            for rows in torch.randperm(n, generator=generator).split(size):
                rows = rows.to(self.device)
                yield {name: x.unflatten(0, (n, -1))[rows].flatten(0, 1) for name, x in experience.items()}
