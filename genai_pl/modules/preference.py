"""Preference learning from pairs: DPO, IPO, hinge, robust DPO, SimPO, ORPO and CPO.

A row holds the prompt with its chosen and its rejected completion as segments 1 and 2, the prompt once where the model
can share it, so one forward pass gives both log-probabilities. Losses are in `objectives/preference.py`: those of
WITH_REFERENCE compare with a frozen reference, the others do not; those in LIKELIHOODS add the negative log-likelihood
of a text.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from genai_pl.errors import ConfigError
from genai_pl.kernels import linear_logprobs
from genai_pl.models import Model
from genai_pl.modules.base import BaseModule, Batch, Metrics, n_replicas
from genai_pl.modules.by_source import LOSSES, NLLS, TARGETS, TOKENS, sums_by_source
from genai_pl.modules.columns import Column
from genai_pl.modules.precompute import add_reference_logprobs, default_cache, fingerprint
from genai_pl.modules.reference import Reference
from genai_pl.objectives import IGNORED, PreferenceCollator, SpecialTokens
from genai_pl.objectives import preference as losses
from genai_pl.objectives.preference import WITH_REFERENCE, WITHOUT_REFERENCE
from genai_pl.objectives.preference_collators import text_labels

# losses that add a negative log-likelihood, and of which tokens: prompts and chosen completions, as the authors of ORPO
# and TRL have it, or chosen completions alone
LIKELIHOODS = {"orpo": "whole", "cpo": "chosen"}


class PreferenceModule(BaseModule):
    """A policy that learns to prefer the chosen completion of each pair.

    The reference is the policy without its adapters, or else a frozen copy of its initial weights
    (`modules/reference.py`).

    loss: sigmoid (DPO), robust, ipo, hinge, simpo, orpo or cpo
    beta: inverse temperature of the implicit reward, or the coefficient of the odds ratio in ORPO
    label_smoothing: assumed share of flipped preferences, of sigmoid and robust
    target_margin: of SimPO, in units of the reward
    nll_coef: weight of the likelihood in CPO
    precompute_reference: compute the reference's log-probabilities before training, and free it
    reference_cache: folder of these files, None for the default
    """

    shapes = ("decoder",)
    data_kind = "preference"
    divides_sequences = True
    columns = (
        *BaseModule.columns,
        Column("rewards/margins", "margin", "{:8.4f}"),
        Column("rewards/accuracies", "accuracy", "{:8.1%}"),
    )

    def __init__(
        self,
        model: Model,
        *,
        vocabulary: SpecialTokens,
        seed: int,
        optimizer: object,
        schedule: object,
        loss: str = "sigmoid",
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        target_margin: float = 0.5,
        nll_coef: float = 1.0,
        precompute_reference: bool = False,
        reference_cache: str | None = None,
    ) -> None:
        super().__init__(model, optimizer=optimizer, schedule=schedule)
        if loss not in WITH_REFERENCE + WITHOUT_REFERENCE:
            known = ", ".join(WITH_REFERENCE + WITHOUT_REFERENCE)
            raise ConfigError(f"objective.loss={loss} is not one of {known}")
        if not beta > 0:
            raise ConfigError(f"objective.beta must be above 0, not {beta}")
        options = {"share_prompts": supports_shared_prompts(model), "likelihood": LIKELIHOODS.get(loss)}
        self.collator = PreferenceCollator(vocabulary=vocabulary, seed=seed, **options)
        self._tokens = torch.ones(())  # tokens of the current step in the likelihood term
        self.likelihood_coef = nll_coef if loss == "cpo" else 1.0
        self.kind, self.beta, self.label_smoothing = loss, beta, label_smoothing
        self.loss_falls = loss != "ipo"  # a squared distance from 1 / (2 beta) rises far above its best in good runs
        self.target_margin = target_margin
        self.reference = Reference(model) if loss in WITH_REFERENCE else None
        self.precompute_reference, self.reference_cache = precompute_reference, reference_cache

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self.reference is not None and self.precompute_reference:
            self._precompute()

    def _precompute(self) -> None:
        """Compute the reference's log-probabilities of all pairs, training and validation, and free it."""
        data, trainer = self.trainer.datamodule, self.trainer
        reference, folder = self.reference, self.reference_cache
        with reference.of(self.model) as model:
            name = fingerprint(model, trainer.precision)
        ranks = trainer.strategy.distributed_sampler_kwargs if n_replicas(trainer) > 1 else {}
        add_reference_logprobs(
            [*data.train_rows, *data.val_rows],
            self._reference_logprobs,
            file=(Path(folder) if folder else default_cache()) / f"{name}.npz",
            batch_size=data.val_batch_size,
            rank=ranks.get("rank", 0),
            world_size=n_replicas(trainer),
            over_ranks=lambda values: self._over_ranks(values.to(self.device)).cpu(),
        )
        self.reference = None

    def _reference_logprobs(self, rows: list[dict[str, object]]) -> Tensor:
        batch = {name: x.to(self.device) for name, x in self.collator(rows).items()}
        with self.trainer.precision_plugin.forward_context():
            return self._compute_reference(batch)

    def step_targets(self, batch: Batch) -> Tensor:
        """The targets of the step, pairs; the tokens of its likelihood term are also summed over ranks.

        The preference term is a mean over pairs, the likelihood term one over tokens.
        """
        if not self.window and "window_tokens" in batch:
            self._tokens = self._over_ranks(batch["window_tokens"]).clamp(min=1)
        return super().step_targets(batch)

    def step(self, batch: Batch) -> Metrics:
        """Sums over pairs of the loss, log-probabilities and implicit rewards."""
        if self.kind in LIKELIHOODS:
            return self._with_likelihood(batch)
        # log-probabilities of whole completions; the losses without a likelihood term
        policy = completion_logprobs(self.model, batch)  # (B, 2): chosen, rejected
        lengths = losses.segment_sums(batch["labels"] != IGNORED, batch["segment_ids"], 2)
        if self.kind in WITHOUT_REFERENCE:
            simpo = {"beta": self.beta, "target_margin": self.target_margin}
            loss = losses.simpo_loss(policy, lengths, **simpo)
            by_source = self.losses_of_rows(batch, lambda rows: losses.simpo_loss(policy[rows], lengths[rows], **simpo))
            rewards = self.beta * policy.detach()
        else:
            reference = batch["reference_logprobs"] if self.reference is None else self._compute_reference(batch)
            loss, rewards = (
                self._loss_against_reference(policy, reference, lengths),
                self.beta * (policy - reference).detach(),
            )
            by_source = self.losses_of_rows(
                batch, lambda rows: self._loss_against_reference(policy[rows], reference[rows], lengths[rows])
            )
        return {"loss": loss, **_describe(policy, rewards), **by_source}

    def _with_likelihood(self, batch: Batch) -> Metrics:
        """Sums of a loss with a mean over pairs and one over tokens, under a single normalizer, the number of pairs.

        The likelihood is scaled by pairs / tokens of the step: divided by the pairs later, it becomes a mean over
        tokens.
        """
        # log-probabilities of the tokens whose likelihood counts, and from them those of completions
        labels, segments = batch["labels"], batch["segment_ids"]
        text_or_completion_labels = labels if self.kind == "cpo" else text_labels(batch)
        logprobs = token_logprobs(self.model, {**batch, "labels": text_or_completion_labels})
        policy = losses.segment_sums(torch.where(labels != IGNORED, logprobs, 0), segments, 2)
        lengths = losses.segment_sums(labels != IGNORED, segments, 2)
        likelihood = losses.segment_sums(logprobs, segments, 1)[:, 0]
        # in validation each batch is scaled by its own counts; the sums kept for the logs are exact
        pairs, tokens = (self._targets, self._tokens) if self.training else (batch["targets"], batch["tokens"])
        scaled = likelihood * (pairs / tokens.clamp(min=1))

        def loss_of(rows: Tensor | slice, likelihood: Tensor) -> Tensor:
            """The loss summed over rows, with this likelihood (B,) of each pair."""
            options = {"beta": self.beta, "likelihood": likelihood[rows]}
            if self.kind == "orpo":
                return losses.orpo_loss(policy[rows], lengths[rows], **options)
            return losses.cpo_loss(policy[rows], lengths[rows], nll_coef=self.likelihood_coef, **options)

        loss = loss_of(slice(None), scaled)
        sums = {
            "preference": loss.detach() + self.likelihood_coef * scaled.detach().sum(),
            "nll": -likelihood.sum(),
        }
        sums |= self._likelihoods_by_source(batch, loss_of, likelihood.detach(), text_or_completion_labels)
        return {"loss": loss, **sums, "tokens": batch["tokens"], **_describe(policy, self.beta * policy.detach())}

    def _likelihoods_by_source(
        self, batch: Batch, loss_of: Callable[..., Tensor], likelihood: Tensor, labels: Tensor
    ) -> Metrics:
        """Sums by source of the preference term over pairs and of the weighted likelihood term over tokens.

        likelihood: (B,), of the labels (B, T) in the first segment of each row.
        """
        if not self.source_names:
            return {}
        none = torch.zeros_like(likelihood)
        by_source = self.losses_of_rows(batch, lambda rows: loss_of(rows, none))
        tokens = ((labels != IGNORED) & (batch["segment_ids"] == 1)).sum(1)
        nlls = sums_by_source(len(self.source_names), batch["sources"], -self.likelihood_coef * likelihood, tokens)
        return {**by_source, NLLS: nlls[LOSSES], TOKENS: nlls[TARGETS]}

    def summarize(self, sums: Metrics, targets: Tensor) -> Metrics:
        """With a likelihood term, `nll` is per token and the loss is preference + coefficient * nll."""
        if self.kind not in LIKELIHOODS:
            return super().summarize(sums, targets)
        nll, preference = sums["nll"] / sums["tokens"].clamp(min=1), sums["preference"] / targets
        rest = {name: sums[name] for name in sums if name not in ("loss", "nll", "tokens", "preference")}
        loss = preference + self.likelihood_coef * nll
        return {"loss": loss, "nll": nll, **super().summarize(rest, targets)}

    def _compute_reference(self, batch: Batch) -> Tensor:
        """Log-probabilities (B, 2) of the completions under the reference."""
        with self.reference.of(self.model) as model:
            return completion_logprobs(model, batch)

    def _loss_against_reference(self, policy: Tensor, reference: Tensor, lengths: Tensor) -> Tensor:
        """The loss of policy and reference log-probabilities (B, 2); IPO takes means per token, lengths are (B, 2)."""
        if self.kind == "ipo":
            policy, reference = policy / lengths, reference / lengths
        margins = [logprobs[:, 0] - logprobs[:, 1] for logprobs in (policy, reference)]
        if self.kind == "ipo":
            return losses.ipo_loss(*margins, beta=self.beta)
        if self.kind == "hinge":
            return losses.hinge_loss(*margins, beta=self.beta)
        if self.kind == "robust":
            return losses.robust_dpo_loss(*margins, beta=self.beta, label_smoothing=self.label_smoothing)
        return losses.dpo_loss(*margins, beta=self.beta, label_smoothing=self.label_smoothing)


def _describe(policy: Tensor, rewards: Tensor) -> Metrics:
    """Sums over pairs of log-probabilities and implicit rewards (B, 2), for the logs."""
    sums = {"logps/chosen": policy[:, 0].sum(), "logps/rejected": policy[:, 1].sum()}
    return {**sums, **losses.preference_metrics(*rewards.unbind(1))}


def supports_shared_prompts(model: nn.Module) -> bool:
    """Whether completions of a prompt can be read in one row that holds the prompt once."""
    return getattr(model, "supports_shared_prompts", False)


def shared_prompt_inputs(batch: Batch) -> Batch:
    """Inputs of `features` for rows whose completions share a prompt; none for other rows."""
    return {"shared_prompt_len": batch["shared_prompt_len"]} if "shared_prompt_len" in batch else {}


def token_logprobs(model: nn.Module, batch: Batch, *, hidden: Tensor | None = None) -> Tensor:
    """Log-probability of each label (B, T), 0 where there is none, computed in chunks without materializing full logits.

    hidden: (B, T, C), the features of the batch, where they have been computed already
    """
    if hidden is None:
        hidden = model.features(batch["input_ids"], batch["segment_ids"], **shared_prompt_inputs(batch))
    hidden, head, context = model.to_head(hidden), model.lm_head, model.context_group
    labels = context.shard(batch["labels"], IGNORED)  # of the tokens whose hidden states this rank has
    options = {"bias": head.bias, "softcap": model.config.logit_softcap, "ignore_index": IGNORED}
    logprobs = linear_logprobs(hidden, head.weight, labels, **options)
    return context.gather_values(logprobs, batch["labels"].shape[1])


def completion_logprobs(model: nn.Module, batch: Batch, n: int = 2) -> Tensor:
    """Log-probability of the completion in each of the n segments of a row, (B, n)."""
    return losses.segment_sums(token_logprobs(model, batch), batch["segment_ids"], n)
