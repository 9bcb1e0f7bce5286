"""Policy-gradient modules: reinforcement learning on rollouts.

One batch of prompts is one training step of Lightning and several optimizer steps: generate completions, score them,
turn them into an experience (advantages, old log-probabilities), then pass over it `epochs` times in minibatches, each
of which is one optimizer step (manual optimization). Then the next prompts. GRPO and PPO define the experience and the
loss.
"""

from abc import abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from genai_pl.errors import ConfigError
from genai_pl.modules.base import Batch, Metrics
from genai_pl.modules.columns import Column
from genai_pl.modules.curriculum import STATE, Curriculum
from genai_pl.modules.rollout import Experience, Rollout, ScoredRollout, micro_batches, select_rows
from genai_pl.modules.rollout_module import SHOWN, Means, RolloutModule


class PolicyGradientModule(RolloutModule):
    """A policy that learns from its own rollouts; a subclass defines `make_experience`, `loss` and `loss_normalizer`.

    epochs: passes over a rollout
    minibatch_size: completions of one optimizer step, None for all of the rollout
    max_kl: end the passes over a rollout once the policy is this far from the one that generated it, in nats per
        token; None: never
    curriculum: share of the prompts of a rollout that are drawn by measured difficulty, 0: none. pass_score: least score of a
        completion that passes

    Remaining options are those of `RolloutModule`. Sampling and minibatches depend on the seed, the step and the rank
    alone, so a resumed run draws what the uninterrupted run would have drawn.
    """

    # the loss of a policy is no measure of what it has learned: GRPO's is 0 at the first step of every rollout
    columns = (
        Column("objective/scores", "reward", "{:8.4f}"),
        Column("objective/kl", "KL", "{:8.4f}"),
        Column("objective/response_length", "length", "{:7.1f}"),
    )
    loss_falls = False
    critic_name: str | None = None  # a separate value model, to be loaded by whoever builds the run

    def __init__(
        self,
        *args: object,
        epochs: int,
        minibatch_size: int | None,
        max_kl: float | None,
        curriculum: float = 0.0,
        pass_score: float = 0.5,
        **options: object,
    ) -> None:
        super().__init__(*args, **options)
        if not 0 <= curriculum <= 1:
            raise ConfigError(f"objective.curriculum must be from 0 to 1, the share that is drawn, not {curriculum}")
        for name, value in {"minibatch_size": minibatch_size, "epochs": epochs}.items():
            if value is not None and value < 1:
                raise ConfigError(f"objective.{name} must be at least 1, not {value}")
        if max_kl is not None and not max_kl > 0:
            raise ConfigError(f"objective.max_kl must be above 0, not {max_kl}")
        self.automatic_optimization = False
        self.epochs, self.minibatch_size, self.max_kl = epochs, minibatch_size, max_kl
        if minibatch_size is not None and minibatch_size % self.group_size:
            self.share_prompts = False  # a row, with all its completions, must fall into one minibatch
        self.curriculum_share, self.pass_score = curriculum, pass_score
        self.curriculum: Curriculum | None = None  # once the number of prompts is known
        self._stored_curriculum: dict[str, Tensor] | None = None  # of a checkpoint
        self._rollout_tokens = 0  # of the last rollout: prompts, completions and padding

    def on_fit_start(self) -> None:
        """Make the curriculum, with what a checkpoint has measured; ConfigError for data whose prompts have no numbers."""
        super().on_fit_start()
        data = self.trainer.datamodule
        if self.curriculum_share and (self.source_names or data.streaming):
            raise ConfigError(
                "objective.curriculum measures the prompts of one source: set it to 0 with data.sources or data.streaming"
            )
        if self.curriculum_share:
            options = {"share": self.curriculum_share, "pass_score": self.pass_score}
            self.curriculum = Curriculum(len(data.train_rows), **options)
            if self._stored_curriculum:
                self.curriculum.load_state_dict(self._stored_curriculum)

    def on_save_checkpoint(self, checkpoint: dict[str, object]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self.curriculum is not None:
            checkpoint[STATE] = self.curriculum.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, object]) -> None:
        super().on_load_checkpoint(checkpoint)
        self._stored_curriculum = checkpoint.get(STATE)

    @abstractmethod
    def make_experience(self, rollout: Rollout, scores: Tensor) -> tuple[Experience, Means]:
        """The experience that minibatches are drawn from, with `kl` (N,) in it, and metrics of the rollout.

        Both may be without what the updates measure, which `describe_updates` gives then.
        """

    def describe_updates(self, scored: ScoredRollout, experience: Experience) -> tuple[Tensor, Means]:
        """(`kl` (N,), metrics) that are known once the updates are done."""
        return experience["kl"], {}

    @abstractmethod
    def loss(self, minibatch: Experience) -> tuple[Tensor, Metrics]:
        """The loss of some rows as a sum, and sums over their tokens for the logs."""

    @abstractmethod
    def loss_normalizer(self, minibatch: Experience) -> Tensor:
        """This rank's summand of the number that divides a minibatch's loss: tokens or completions."""

    def teaching_rows(self, minibatch: Experience) -> Experience:
        """The rows of a minibatch whose loss has a gradient, at least one; a subclass may know of others."""
        return minibatch

    def complete_rollout(self, scored: ScoredRollout, generator: torch.Generator) -> tuple[ScoredRollout, Means]:
        """The rollout that is learned from, and metrics of what was sampled for it; a subclass may sample more."""
        return scored, {}

    def step(self, batch: Batch) -> Metrics:
        raise NotImplementedError("rollouts are learned from in training_step")

    def n_tokens(self, batch: Batch) -> int:
        """Tokens of the rows that the last rollout made of the batch: the batch itself holds prompts only."""
        return self._rollout_tokens

    def n_updates(self, prompts: int) -> int:
        """Optimizer steps that a rollout of this many prompts gives."""
        n = prompts * self.group_size
        return self.epochs * -(-n // (self.minibatch_size or n))

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Generate and score completions of the prompts, and take `epochs` passes of optimizer steps over them.

        Normalization is exact as in BaseModule: a minibatch's sum over all its micro-batches and ranks, divided by one
            normalizer. The check against max_kl needs the gradient pass of a minibatch, and so comes before its step:
            that minibatch is dropped.
        """
        # rollout
        generator = self.seeded_generator(self.device)
        batch = self._draw_prompts(batch)
        scored = self.generate_and_score(batch, self.group_size, generator)
        of_sources = self.scores_by_source(batch, scored.scores)
        self.record_scores(batch, scored.scores)
        scored, of_sampling = self.complete_rollout(scored, generator)
        self._rollout_tokens = scored.rollout.batch["input_ids"].numel()
        experience, means = self.make_experience(scored.rollout, scored.scores)
        means |= {f"objective/{name}": mean for name, mean in of_sources.items()} | of_sampling
        if self.curriculum is not None:
            means["objective/pass_rate"] = self.curriculum.advance(self._over_ranks, self.device)
            means["objective/measured_prompts"] = (self.curriculum.tries > 0).sum(), len(self.curriculum.tries)
        optimizer, schedule = self.optimizers(), self.lr_schedulers()
        # updates; the loops break on all ranks together, as the KL is summed over ranks
        sums: Metrics = {}
        for minibatch in self._minibatches(experience):
            optimizer.zero_grad()
            normalizer = self._over_ranks(self.loss_normalizer(minibatch).float()).clamp(min=1)
            minibatch = self.teaching_rows(minibatch)  # after the normalizer, which counts all
            metrics = self._backward(minibatch, self.trainer.world_size / normalizer)
            if sums and self._kl_exceeded(metrics["policy/approxkl"], minibatch["mask"]):
                optimizer.zero_grad()
                self.routing.drop_step()
                break
            loss = metrics["loss"]
            self.window = {"loss": loss}  # checked for finiteness with the gradient norm
            self.configure_gradient_clipping(optimizer.optimizer, self.clip_norm)
            optimizer.step()
            schedule.step()
            metrics |= {"loss": loss / normalizer, "tokens": minibatch["mask"].sum(), "updates": loss.new_ones(())}
            sums = _add_sums(sums, metrics)
        kl, of_updates = self.describe_updates(scored, experience)
        self.examples = scored.examples(kl, SHOWN)
        self._keep_means(means | of_updates, sums)

    def _draw_prompts(self, batch: Batch) -> Batch:
        """The batch with the share of its prompts that the curriculum draws in the place of others."""
        if self.curriculum is None:
            return batch
        data, ranks = self.trainer.datamodule, {"rank": 0, "num_replicas": 1}
        if self.trainer.world_size > 1:
            ranks = self.trainer.strategy.distributed_sampler_kwargs
        # the rows of all ranks, in the order of the data; draws by seed and step, as those of minibatches
        rows = torch.zeros(ranks["num_replicas"], data.batch_size, dtype=torch.float64, device=self.device)
        rows[ranks["rank"], : len(batch["rows"])] = batch["rows"].to(rows) + 1
        rows = self._over_ranks(rows).long().cpu() - 1
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.trainer.global_step)
        own = self.curriculum.draw(rows.flatten(), generator).view_as(rows)[ranks["rank"]]
        return self.collate_rows(own[own >= 0].tolist())

    def collate_rows(self, rows: Sequence[int]) -> Batch:
        """A batch of training rows by number."""
        data = self.trainer.datamodule
        return data.collate([{**data.train_rows[row], "key": (0, row)} for row in rows])

    def record_scores(self, batch: Batch, scores: Tensor) -> None:
        """Count the completions of a batch's prompts for the curriculum."""
        if self.curriculum is not None:
            self.curriculum.record(batch["rows"], scores)

    def _backward(self, minibatch: Experience, factor: Tensor) -> Metrics:
        """Accumulate the gradient of a minibatch by micro-batches; returns sums over its tokens, and its loss."""
        sums: Metrics = {}
        for _, micro_batch in micro_batches(minibatch, self.rows_at_once(minibatch)):
            with self.routing.collected():
                loss, metrics = self.loss(micro_batch)
            auxiliary = self.routing.loss(self.loss_normalizer(micro_batch))
            self.manual_backward((loss + auxiliary) * factor)
            sums = _add_sums(sums, {**metrics, "loss": loss.detach()})
        return sums

    def _keep_means(self, means: Means, sums: Metrics) -> None:
        """Keep the metrics of the rollout and its updates for `step_metrics`."""
        tokens, updates, loss = sums.pop("tokens"), sums.pop("updates"), sums.pop("loss")
        self.means = {**means, **{name: (value, tokens) for name, value in sums.items()}}
        self.means["loss"] = loss, updates / self.trainer.world_size  # each rank has a part of the sum
        self.means["policy/updates"] = updates, 1

    def _kl_exceeded(self, kl: Tensor, mask: Tensor) -> bool:
        """Whether the mean KL per token from the policy that generated the rollout is above max_kl."""
        if self.max_kl is None:
            return False
        return bool(self._over_ranks(kl) > self.max_kl * self._over_ranks(mask.sum()))

    def step_metrics(self) -> dict[str, float]:
        """Means over the last rollout, over all ranks; every rank must call it."""
        # one all-reduce for all sums and counts, in float64
        parts = [[float(part) for part in mean] for mean in self.means.values()]
        sums, counts = self._over_ranks(torch.tensor(parts, dtype=torch.float64, device=self.device)).unbind(1)
        means = dict(zip(self.means, (sums / counts.clamp(min=1)).tolist(), strict=True))
        # no score where no reward applies, and of a source of a mixture that this rollout has no prompt of
        of_scores = ("objective/scores", "objective/rlhf_reward")
        absent = {k for k, n in zip(self.means, counts.tolist(), strict=True) if k.startswith(of_scores) and not n}
        return {k if "/" in k else f"train/{k}": v for k, v in means.items() if k not in absent}

    def seeded_generator(self, device: torch.device | str) -> torch.Generator:
        """A generator of this step and rank."""
        number = (self.seed * 1_000_003 + self.trainer.global_step) * 1_009 + self.global_rank
        return torch.Generator(device).manual_seed(number)

    def _minibatches(self, experience: Experience) -> Iterator[Experience]:
        """`epochs` passes over the rows in drawn orders, the same on every rank."""
        n, completions = len(experience["input_ids"]), len(experience["mask"])
        size = (self.minibatch_size or completions) * n // completions
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.trainer.global_step)
        for _ in range(self.epochs):
            for rows in torch.randperm(n, generator=generator).split(size):
                yield select_rows(experience, rows.to(self.device), n)


def _add_sums(sums: Metrics, metrics: Metrics) -> Metrics:
    return {name: sums.get(name, 0) + value for name, value in metrics.items()}
