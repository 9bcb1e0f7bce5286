"""Reinforcement learning on completions: write, judge, learn from it in minibatches, write again."""

from abc import abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from genai_pl.errors import ConfigError
from genai_pl.models import Model
from genai_pl.modules.base import BaseModule, Batch, Metrics
from genai_pl.modules.passes import Experience, passes, put_back, take
from genai_pl.modules.preference import shared_beginning, shares_beginnings, token_logprobs
from genai_pl.modules.reference import Reference
from genai_pl.modules.rollout import Example, Judged, Reward, Rollout, at_places, write
from genai_pl.objectives import Vocabulary, token_entropy
from genai_pl.objectives.prompts import PromptCollator
from genai_pl.specs import GenerationConfig

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
        micro_batch_size: int | None,
        max_new_tokens: int,
        temperature: float,
        missing_eos_penalty: float,
        max_kl: float | None,
    ) -> None:
        super().__init__(model, optimizer=optimizer, schedule=schedule)
        if vocabulary.end is None:
            raise ConfigError("the tokenizer has no end token: completions could not end")
        sizes = {"minibatch_size": minibatch_size, "micro_batch_size": micro_batch_size, "group_size": group_size}
        for name, value in {**sizes, "epochs": epochs, "max_new_tokens": max_new_tokens}.items():
            if value is not None and value < 1:
                raise ConfigError(f"objective.{name} must be at least 1, not {value}")
        if max_kl is not None and not max_kl > 0:
            raise ConfigError(f"objective.max_kl must be above 0, not {max_kl}")
        self.automatic_optimization = False
        self.collator = PromptCollator(vocabulary=vocabulary, seed=seed)
        self.vocabulary, self.seed = vocabulary, seed
        self.group_size, self.epochs = group_size, epochs
        self.minibatch_size, self.micro_batch_size = minibatch_size, micro_batch_size
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
    def loss(self, part: Experience) -> tuple[Tensor, Metrics]:
        """The loss of some rows as a sum, and sums over their tokens."""

    @abstractmethod
    def divisor(self, part: Experience) -> Tensor:
        """By what the loss of a minibatch is divided, which is added up over ranks."""

    def states(self, part: Experience, hidden: Tensor) -> Experience:
        """What else is to be known (R, T) of the states that the policy was in; hidden (R, T, C) are its features."""
        return {}

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
            optimizer.zero_grad()
            divisor = self._over_ranks(self.divisor(part).float()).clamp(min=1)
            found = self._backward(part, self.trainer.world_size / divisor)
            if sums and self._too_far(found["policy/approxkl"], part["mask"]):
                optimizer.zero_grad()
                break
            loss = found["loss"]
            self.window = {"loss": loss}  # with the norm of the gradient, what must be finite
            self.configure_gradient_clipping(optimizer.optimizer, self.clip_norm)
            optimizer.step()
            schedule.step()
            found |= {"loss": loss / divisor, "tokens": part["mask"].sum(), "updates": loss.new_ones(())}
            sums = _added(sums, found)
        self._log_later(means, sums)

    def _backward(self, part: Experience, factor: Tensor) -> Metrics:
        """Add up the gradient of a minibatch pass by pass; the sums over its tokens, and its loss."""
        sums: Metrics = {}
        for _, few in passes(part, self._rows_at_once(part)):
            loss, found = self.loss(few)
            self.manual_backward(loss * factor)
            sums = _added(sums, {**found, "loss": loss.detach()})
        return sums

    def _rows_at_once(self, rows: Experience) -> int:
        n = len(rows["input_ids"])
        return n if self.micro_batch_size is None else max(1, self.micro_batch_size * n // len(rows["places"]))

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
        found = self.read(rollout)
        return torch.where(rollout.mask, found["old"] - found["reference"], 0).sum(1)

    @torch.no_grad()
    def read(self, rollout: Rollout) -> Experience:
        """For each token that was drawn, (N, L), `old` and `reference` log-probabilities, `entropy`, and what `states` adds."""
        rows = {**rollout.batch, "places": rollout.places}
        numbers, parts = [], []
        for number, part in passes(rows, self._rows_at_once(rows)):
            hidden = self.features(part)
            found = {"entropy": self.entropy(hidden, part["labels"]), **self.states(part, hidden)}
            found["old"] = token_logprobs(self.model, part, hidden=hidden)
            with self.reference.of(self.model) as model:
                found["reference"] = token_logprobs(model, part)
            numbers.append(number)
            parts.append({name: at_places(x, part["places"]) for name, x in found.items()})
        return put_back(numbers, parts)

    def features(self, part: Experience) -> Tensor:
        """What the policy makes of rows, (R, T, C)."""
        return self.model.features(part["input_ids"], part["segment_ids"], **shared_beginning(part))

    def entropy(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Of what the policy predicts at each label (R, T); hidden (R, T, C) are its features."""
        head, model = self.model.lm_head, self.model
        options = {"bias": head.bias, "softcap": model.config.logit_softcap}
        return token_entropy(model.to_head(hidden), head.weight, labels, **options)

    def describe(self, rollout: Rollout, scores: Tensor, kl: Tensor, entropy: Tensor) -> Means:
        """Means over a rollout: kl is (N,), entropy (N, L)."""
        n, tokens = len(scores), rollout.mask.sum()
        return {
            "objective/scores": (scores.sum(), n),
            "objective/kl": (kl.sum(), n),
            "objective/entropy": (torch.where(rollout.mask, entropy, 0).sum(), tokens),
            "objective/response_length": (tokens, n),
            "objective/ended": (rollout.ended.sum(), n),
        }

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
                yield take(experience, rows.to(self.device), n)


def _added(sums: Metrics, found: Metrics) -> Metrics:
    return {name: sums.get(name, 0) + value for name, value in found.items()}
