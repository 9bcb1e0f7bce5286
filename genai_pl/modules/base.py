"""The base of all objectives: exact normalization by targets, optimizer and schedule, gradient clipping, validation sums.

An optimizer step may consist of several accumulated batches on several ranks. Its loss is the sum over all of them of
the loss of each target, divided by the number of all targets. To get that exactly, the loader puts `window_targets`
into each batch (this rank's targets in the whole accumulation window), `step_targets` sums it over ranks at the first batch
of a window, and `training_step` divides each batch's sum by that number at once: gradients then add up to the gradient
of the exact mean, without being rescaled later. Logged metrics are sums too, and are divided at the end of the step.
"""

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from genai_pl.config.enums import Head
from genai_pl.distributed.dtensor import is_dtensor, local_shard
from genai_pl.errors import LossError, TrainingError
from genai_pl.modules.by_source import LOSSES, sums_by_source, sums_of_rows, take_losses
from genai_pl.modules.columns import Column
from genai_pl.modules.reference import Reference
from genai_pl.modules.routing import Routing
from genai_pl.optim import StepInBackward
from genai_pl.optim.settings import configure, settings_of

log = logging.getLogger(__name__)

MAX_SKIPPED = 100  # fp16 steps in a row: the scale has fallen by 2^100, and no scale will help
Batch = dict[str, Tensor]
Metrics = dict[str, Tensor]
OptimizerFactory = Callable[[Iterable[tuple[str, nn.Parameter]]], Optimizer]


class BaseModule(L.LightningModule, ABC):
    """A model and its training; a subclass implements `step`, the sums of one batch.

    `step` returns sums over the batch's targets: `loss` is differentiable, everything else is for the logs. The loss
    of an optimizer step is that sum over all ranks and accumulated batches, divided by all their targets: a mean of
    means would weigh a token by how full its batch is.

    model: the network, with `features`, `to_head` and `lm_head` (`genai_pl.models`)
    optimizer: a function from named parameters to an optimizer
    schedule: a function from step and `total_steps` to a factor of the learning rate

    Class attributes say what an objective needs from the rest of a run (the list is in docs/extending.md).
    """

    shapes: tuple[str, ...] = ()  # shapes of models that the objective can train: decoder, encoder, encoder_decoder
    data_kind = "text"  # kind of data that it reads: a value of conf/data
    further_kinds: tuple[str, ...] = ()  # kinds that it reads beside data_kind, one at a time
    source_kinds: tuple[str, ...] = ()  # further kinds that sources of a mixture may have
    needs: tuple[str, ...] = ()  # special tokens that the tokenizer must have: mask, sentinels, fim
    divides_sequences = (
        False  # whether ranks may hold some tokens of each row, whose hidden states alone `step` then has
    )
    sparse = False  # whether only a minority of tokens is predicted
    needs_reward = False  # whether a reward function scores completions in training
    needs_teacher = False  # whether a teacher's predictions are learned
    head: Head | None = None  # head that it trains instead of the language-model head
    embeds = False  # whether it trains embeddings of texts
    labelled = False  # whether the outputs of its head are labels of the data
    weighs_classes = False  # whether its classes may be weighted by the targets of the training rows
    confusion: Tensor | None = None  # (K, K) counts of the last validation by true and predicted class
    reference: Reference | None = None  # the frozen reference policy of preference objectives and RL
    columns = (Column("train/loss", "loss", "{:8.4f}"),)  # metrics of the printed table
    loss_falls = True  # whether a loss far above its best means that the run diverges

    def __init__(
        self,
        model: nn.Module,
        *,
        optimizer: OptimizerFactory,
        schedule: Callable[..., float],
    ) -> None:
        super().__init__()
        self.model = model
        self.make_optimizer, self.schedule = optimizer, schedule
        self.total_steps = 0  # optimizer steps of the run, from `set_run_length`
        self.validated_at = -1  # step of the last validation
        self.validation_cut = False  # whether the current validation was stopped before its last batch
        self.source_names: tuple[str, ...] = ()  # of a mixture, whose batches name the `sources` (B,) of their rows
        self.val_sums: Metrics = {}
        self.window: Metrics = {}  # sums of the current accumulation window
        self.finished: Metrics = {}  # sums of the last complete step
        self.step_loss = torch.zeros(())  # of the last complete step, over all ranks
        self.grad_norm, self.lr = torch.zeros(()), 0.0  # of the last complete step
        self.group_norms: Metrics = {}  # of the last complete step, by the optimizer's group where there are several
        self.strategy_clips = False  # whether the strategy has the gradients, and clips them
        self.global_norm = global_norm  # function; a strategy replaces it where ranks hold different parameters
        # a context in which this process may run the model alone, any number of times; FSDP gathers the weights for it
        self.unsharded_model: Callable[[], AbstractContextManager[None]] = nullcontext
        self.steps_in_backward = False  # until step_in_backward
        self._stepper: StepInBackward | None = None
        self.skipped, self._in_a_row = 0, 0  # steps that fp16 loss scaling skipped
        self._targets = torch.ones(())
        self.routing = Routing(model)

    @abstractmethod
    def step(self, batch: Batch) -> Metrics:
        """Sums over the targets of one batch: `loss`, differentiable, and detached sums for the logs."""

    def set_run_length(self, total_steps: int, schedule: Callable[..., float]) -> None:
        """Set the optimizer steps of the run and the schedule over them; ConfigError for a schedule that does not fit."""
        self.total_steps, self.schedule = total_steps, schedule
        schedule(0, total_steps=total_steps)

    def step_in_backward(self) -> None:
        """Step each weight as soon as its gradient is complete, so that no two gradients need to exist at once."""
        self.steps_in_backward = True

    def load_trained_only(self) -> None:
        """Accept checkpoints without the frozen weights, which the model has already."""
        self.strict_loading = False

    def models(self) -> list[nn.Module]:
        """The model, and the frozen or critic models beside it whose parameters a strategy may shard."""
        beside = None if self.reference is None else self.reference.copy
        return [self.model] if beside is None else [self.model, beside]

    def on_fit_start(self) -> None:
        """Move the reference's own copy, which is no submodule and which Lightning does not move."""
        if self.reference is not None:
            self.reference.to(self.device)

    def on_train_start(self) -> None:
        """Restore the command line's optimizer settings, which a checkpoint has just overwritten with its own."""
        for optimizer, schedule in zip(self.trainer.optimizers, self.trainer.lr_scheduler_configs, strict=True):
            before, group = optimizer.param_groups[0]["lr"], optimizer.param_groups[0]
            configure(optimizer, schedule.scheduler, self._settings)
            if self.trainer.global_step and not math.isclose(group["lr"], before) and self.trainer.is_global_zero:
                form = "schedule    goes on at lr %.3g, not %.3g: over %d steps, with the settings of this command"
                log.info(form, group["lr"], before, self.total_steps)

    def named_parameters_for_optimizer(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Named parameters for the optimizer, frozen ones among them: optimizers leave those out."""
        yield from self.model.named_parameters()

    def epoch_metrics(self) -> Metrics:
        """Validation metrics that are no sums over batches, such as recall among all embeddings of an epoch."""
        return {}

    def export_files(self) -> dict[str, object]:
        """Files to write beside the exported model, by path: JSON values, or tensors for a .safetensors file."""
        return {}

    def n_tokens(self, batch: Batch) -> int:
        """Tokens, padding included, that the model reads in a training step on the batch."""
        return batch["input_ids"].numel()

    def n_updates(self, rows: int) -> int:
        """Optimizer steps that one batch of this many rows gives without accumulation; RL takes several on a rollout."""
        return 1

    def make_prompt(self, text: str) -> str:
        """The prompt for samples during training, made of a few words of the validation text."""
        return text

    def generate_options(self, text: str, mask_token: str | None) -> dict[str, object]:
        """Options of generate.py that show what the model has learned, made of words of the validation text."""
        return {"prompt": self.make_prompt(text)}

    def summarize(self, sums: Metrics, targets: Tensor) -> Metrics:
        """Metrics from sums and the number of targets: by default each sum per target."""
        return {name: value / targets for name, value in sums.items()}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The batch's share of the step's loss.

        It is its summed loss divided by all targets of the step, multiplied by what Lightning and the strategy divide by.
        """
        targets = self.step_targets(batch)
        with self.routing.collected():
            sums = self.step(batch)
        self.accumulate(sums)
        loss = sums["loss"] + self.routing.loss(batch["targets"])
        # Lightning divides by the accumulated batches, and the strategy by the replicas and by ranks that share a row's
        # tokens, whose gradients add up
        scale = self.trainer.accumulate_grad_batches * n_replicas(self.trainer) * self.model.context_group.size
        return loss * (scale / targets)

    def step_targets(self, batch: Batch) -> Tensor:
        """The number of targets of the optimizer step that the batch belongs to, over all ranks, at least 1.

        The first batch of a window communicates; the following ones take the number from it.
        """
        if not self.window:
            self._targets = self._over_ranks(batch["window_targets"])
        return self._targets.clamp(min=1)

    def accumulate(self, sums: Metrics) -> None:
        """Add the detached sums of a batch to those of the current optimizer step."""
        for name, value in sums.items():
            self.window[name] = self.window.get(name, 0) + value.detach()

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the global gradient norm, keep it for the logs, and stop at a loss or gradient that is not finite.

        Lightning calls it once per optimizer step, between the last backward pass and `optimizer.step`. The norm is
        measured even where nothing is clipped. With the optimizer in the backward pass the gradients are gone by now,
        and their norms were taken on the way. A strategy that clips by itself (DeepSpeed) calls `finish_step` instead.
        """
        if self.strategy_clips:
            return
        # norm of each parameter group, then of all
        groups = [[p.grad for p in group["params"] if p.grad is not None] for group in optimizer.param_groups]
        norms = [self.global_norm(group) for group in groups] if self._stepper is None else self._stepper.norms()
        self.finish_step(norms, optimizer)
        # the factor is computed on the device: no synchronization
        if gradient_clip_val:
            scale = (gradient_clip_val / (self.grad_norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_([local_shard(grad) for group in groups for grad in group], scale)

    def finish_step(self, norms: list[Tensor], optimizer: Optimizer) -> None:
        """Keep what the logs tell of a step, with the norm of each group's gradients, or one of all; LossError if not finite."""
        norms = [norm.to(self.device) for norm in norms]  # one without gradients has its 0 on the CPU
        self.grad_norm, self.lr = torch.stack(norms).norm(), optimizer.param_groups[0]["lr"]
        self.group_norms = dict(zip(self._group_names, norms, strict=True)) if len(norms) > 1 else {}
        # the window is complete: its sums become those of the last step
        self.finished, self.window = self.window, {}
        self.routing.finish_step(self._over_ranks)
        loss = self._over_ranks(self.finished["loss"])  # so that all ranks stop, or none
        self.step_loss = loss / self._targets.clamp(min=1)
        # fp16 skips a step with an overflow; in any other precision a value that is not finite ends the run
        if (scaler := self._scaler()) is not None:
            self._count_skipped(scaler)
        elif not torch.isfinite(self.grad_norm + loss):
            what = "gradient" if torch.isfinite(loss) else "loss"
            raise LossError(f"the {what} is not finite at step {self.trainer.global_step + 1}")

    def _scaler(self) -> torch.amp.GradScaler | None:
        """The gradient scaler of fp16, which skips a step whose gradients overflow at its loss scale; else None."""
        return getattr(self.trainer.precision_plugin, "scaler", None)

    def _count_skipped(self, scaler: torch.amp.GradScaler) -> None:
        """Log a skipped fp16 step; TrainingError after MAX_SKIPPED in a row."""
        if torch.isfinite(self.grad_norm):
            self._in_a_row = 0
            return
        self.skipped, self._in_a_row = self.skipped + 1, self._in_a_row + 1
        step, scale = self.trainer.global_step + 1, scaler.get_scale()
        log.info("fp16        step %d skipped: a gradient overflows at loss scale %g, which is lowered", step, scale)
        if self._in_a_row == MAX_SKIPPED:
            raise TrainingError(
                f"precision=fp16: {MAX_SKIPPED} steps in a row skipped up to step {step}, at any loss scale; "
                "take precision=bf16 or fp32"
            )

    def step_metrics(self) -> dict[str, float]:
        """Metrics of the last optimizer step, over all ranks; every rank must call it."""
        sums = {name: self._over_ranks(value) for name, value in self.finished.items()}
        by_source = take_losses(self.source_names, sums)
        metrics = self.summarize(sums, self._targets.clamp(min=1)) | by_source  # 0 for a step without targets
        # names with a slash, such as rewards/chosen, keep their prefix
        return {k if "/" in k and not k.startswith("loss/") else f"train/{k}": v.item() for k, v in metrics.items()}

    def update_metrics(self) -> dict[str, float]:
        """Metrics of the last update, which every rank must ask for: learning rate, gradient norm, norm of each parameter group
        where there are several, and the routing of a mixture of experts.
        """
        metrics = {"train/lr": self.lr, "train/grad_norm": self.grad_norm.item()}
        metrics |= self.routing.metrics(self._over_ranks)
        metrics |= {f"train/grad_norm/{name}": norm.item() for name, norm in self.group_norms.items()}
        return metrics if self._scaler() is None else {**metrics, "train/skipped_steps": self.skipped}

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        sums = self.step(batch)
        if self.source_names and LOSSES not in sums:  # a batch of one source
            first = batch["sources"][:1], sums["loss"][None], batch["targets"][None]
            sums |= sums_by_source(len(self.source_names), *first)
        self.count_validated(batch, sums)

    def losses_of_rows(self, batch: Batch, loss: Callable[[Tensor], Tensor]) -> Metrics:
        """Sums by source of a loss that adds up over rows (`sums_of_rows`); none without a mixture."""
        return sums_of_rows(len(self.source_names), batch["sources"], loss) if self.source_names else {}

    def count_validated(self, batch: Batch, sums: Metrics) -> None:
        """Add the sums of a batch, and its targets, to those of the current validation, in float64."""
        for name, value in {**sums, "targets": batch["targets"]}.items():
            self.val_sums[name] = self.val_sums.get(name, 0) + value.detach().double()

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of a complete validation over all ranks; LossError where its loss is not finite.

        A validation that a signal has cut short is dropped: its mean would be over other rows.
        """
        if self.validation_cut:
            self.val_sums = {}
            return
        sums = {name: self._over_ranks(value) for name, value in self.val_sums.items()}
        self.val_sums = {}
        self.validated_at = self.trainer.global_step
        targets = sums.pop("targets")
        if targets > 0 and not torch.isfinite(sums.get("loss", targets)):
            raise LossError(f"the validation loss is not finite after step {self.trainer.global_step}")
        by_source = take_losses(self.source_names, sums)
        metrics = self.summarize(sums, targets) | self.epoch_metrics() | by_source
        step = torch.tensor(
            float(self.trainer.global_step)
        )  # else Lightning counts the last step of a fit as not yet done
        self.log_dict({"step": step, **{f"val/{k}": v.float() for k, v in metrics.items()}})

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer, and its schedule by step as a factor of each group's learning rate."""
        optimizer = self.make_optimizer(self.named_parameters_for_optimizer())
        self._group_names = [group.get("name", str(n)) for n, group in enumerate(optimizer.param_groups)]
        if self.steps_in_backward:
            self._stepper = StepInBackward(optimizer)
        scheduler = LambdaLR(optimizer, lambda step: self.schedule(step, total_steps=self.total_steps))
        self._settings = settings_of(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _over_ranks(self, value: Tensor) -> Tensor:
        """The sum of a value over all ranks, in which ranks that share a batch (tensor parallelism, pipeline) count once."""
        copies = self.trainer.world_size // n_replicas(self.trainer)
        return self.trainer.strategy.reduce(value.clone(), reduce_op="sum") / copies


def n_replicas(trainer: L.Trainer) -> int:
    """Number of data-parallel replicas: processes, or groups of processes, that see different batches."""
    return 1 if trainer.world_size == 1 else trainer.strategy.distributed_sampler_kwargs["num_replicas"]


def global_norm(gradients: list[Tensor]) -> Tensor:
    """The L2 norm of all gradients together, on every rank; 0 for no gradients.

    Gradients may be plain tensors and DTensors of several meshes (FSDP beside tensor parallelism): torch takes the
    norm of one mesh at a time, so there is one per mesh, and the norm of those.
    """
    if not gradients:
        return torch.zeros(())
    meshes: dict[object, list[Tensor]] = {}
    for gradient in gradients:
        meshes.setdefault(gradient.device_mesh if is_dtensor(gradient) else None, []).append(gradient)
    norms = [torch.nn.utils.get_total_norm(group) for group in meshes.values()]
    norms = [norm.full_tensor() if is_dtensor(norm) else norm for norm in norms]
    return norms[0] if len(norms) == 1 else torch.stack(norms).norm()
