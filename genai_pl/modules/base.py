"""What every objective shares: exact normalization by tokens, one optimizer and schedule, gradient norm, validation sums."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from genai_pl.config.enums import Head
from genai_pl.distributed.dtensor import local_shard
from genai_pl.errors import LossError, TrainingError
from genai_pl.modules.columns import Column
from genai_pl.modules.reference import Reference
from genai_pl.optim import StepInBackward
from genai_pl.optim.settings import configure, settings_of

log = logging.getLogger(__name__)

MAX_SKIPPED = 100  # fp16 steps in a row: the scale has fallen by 2^100, and no scale will help
Batch = dict[str, Tensor]
Metrics = dict[str, Tensor]
OptimizerFactory = Callable[[Iterable[tuple[str, nn.Parameter]]], Optimizer]


class BaseModule(L.LightningModule, ABC):
    """A model and its training; a subclass says in `step` what one batch costs.

    `step` returns sums over the batch's targets: `loss` is differentiable, everything else is for the logs. The loss of an
    optimizer step is that sum over all ranks and accumulated batches, divided by all their targets: a mean of means
    would weigh a token by how full its batch is.
    """

    shapes: tuple[str, ...] = ()  # of models that it can train
    data_kind = "text"  # the data that it reads
    needs: tuple[str, ...] = ()  # kinds of tokens that the tokenizer must have: mask, sentinels, fim
    sparse = False  # whether most tokens are not predicted
    needs_reward = False  # whether completions are judged in training
    head: Head | None = None  # what it trains instead of the language-model head
    embeds = False  # whether it trains vectors of texts
    reference: Reference | None = None  # what the model is measured against
    columns = (Column("train/loss", "loss", "{:8.4f}"),)  # what the objective is about, in the table
    loss_falls = True  # whether a loss far above its best says that the run diverges

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
        self.total_steps = 0  # set once the length of the data is known
        self.validated_at = -1  # step of the last validation
        self.validation_cut = False  # whether the one under way was stopped before its last batch
        self.val_sums: Metrics = {}
        self.window: Metrics = {}  # sums of the optimizer step under way
        self.finished: Metrics = {}  # sums of the last complete step
        self.step_loss = torch.zeros(())  # of the last complete step, over all ranks
        self.grad_norm, self.lr = torch.zeros(()), 0.0  # of the last complete step
        self.group_norms: Metrics = {}  # of the last complete step, by the optimizer's group where there are several
        self.global_norm = global_norm  # of gradients, some of which a strategy may keep elsewhere
        # around what runs the model as often as it likes, in this process alone; a strategy may have to gather weights
        self.unsharded_model: Callable[[], AbstractContextManager[None]] = nullcontext
        self.steps_in_backward = False  # whether weights move during the backward pass
        self._stepper: StepInBackward | None = None
        self.skipped, self._in_a_row = 0, 0  # steps that the loss scaling of fp16 left out
        self._targets = torch.ones(())

    @abstractmethod
    def step(self, batch: Batch) -> Metrics:
        """Sums over the targets of one batch."""

    def models(self) -> list[nn.Module]:
        """The model, and those beside it that a strategy may cut in pieces."""
        beside = None if self.reference is None else self.reference.copy
        return [self.model] if beside is None else [self.model, beside]

    def on_fit_start(self) -> None:
        if self.reference is not None:
            self.reference.to(self.device)

    def on_train_start(self) -> None:
        # a checkpoint brings the settings that its optimizer had; those of the command line count
        for optimizer, schedule in zip(self.trainer.optimizers, self.trainer.lr_scheduler_configs, strict=True):
            configure(optimizer, schedule.scheduler, self._settings)

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What the optimizer is given."""
        yield from self.model.named_parameters()

    def epoch_metrics(self) -> Metrics:
        """Metrics of a whole validation that are no sums over its batches."""
        return {}

    def export_files(self) -> dict[str, object]:
        """JSON values to write beside the exported model, or tensors of a .safetensors file, by path."""
        return {}

    def n_tokens(self, batch: Batch) -> int:
        """Tokens, padding included, that the model reads in a training step on the batch."""
        return batch["input_ids"].numel()

    def n_updates(self, rows: int) -> int:
        """Optimizer steps that a batch of so many rows is good for, where nothing is accumulated."""
        return 1

    def make_prompt(self, text: str) -> str:
        """What to show the model while it trains, from words of the validation text."""
        return text

    def generate_options(self, text: str, mask_token: str | None) -> dict[str, object]:
        """What generate.py is to be given to show what the model has learned, from words of the validation text."""
        return {"prompt": self.make_prompt(text)}

    def summarize(self, sums: Metrics, targets: Tensor) -> Metrics:
        """Metrics from sums: by default each sum per target."""
        return {name: value / targets for name, value in sums.items()}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        targets = self.begin(batch)
        sums = self.step(batch)
        self.count(sums)
        # Lightning divides by the accumulated batches and the strategy by the ranks that see different ones
        scale = self.trainer.accumulate_grad_batches * n_replicas(self.trainer)
        return sums["loss"] * (scale / targets)

    def begin(self, batch: Batch) -> Tensor:
        """All targets of the optimizer step that the batch belongs to, at least 1."""
        if not self.window:
            self._targets = self._over_ranks(batch["window_targets"])
        return self._targets.clamp(min=1)

    def count(self, sums: Metrics) -> None:
        """Add a batch to the optimizer step under way."""
        for name, value in sums.items():
            self.window[name] = self.window.get(name, 0) + value.detach()

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the global norm, keep it for the logs, and stop at a loss or gradient that is not a number."""
        groups = [[p.grad for p in group["params"] if p.grad is not None] for group in optimizer.param_groups]
        norms = [self.global_norm(group) for group in groups] if self._stepper is None else self._stepper.norms()
        norms = [norm.to(self.device) for norm in norms]  # a group without gradients has its 0 on the CPU
        self.grad_norm, self.lr = torch.stack(norms).norm(), optimizer.param_groups[0]["lr"]
        self.group_norms = dict(zip(self._group_names, norms, strict=True)) if len(norms) > 1 else {}
        self.finished, self.window = self.window, {}
        loss = self._over_ranks(self.finished["loss"])  # so that all ranks stop, or none
        self.step_loss = loss / self._targets.clamp(min=1)
        if (scaler := self._scaler()) is not None:
            self._count_skipped(scaler)
        elif not torch.isfinite(self.grad_norm + loss):
            what = "gradient" if torch.isfinite(loss) else "loss"
            raise LossError(f"the {what} is not finite at step {self.trainer.global_step + 1}")
        if gradient_clip_val:
            scale = (gradient_clip_val / (self.grad_norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_([local_shard(grad) for group in groups for grad in group], scale)

    def _scaler(self) -> torch.amp.GradScaler | None:
        """What scales the loss of fp16, and skips a step whose gradients are not finite at that scale."""
        return getattr(self.trainer.precision_plugin, "scaler", None)

    def _count_skipped(self, scaler: torch.amp.GradScaler) -> None:
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
        """Metrics of the last optimizer step, over all ranks."""
        sums = {name: self._over_ranks(value) for name, value in self.finished.items()}
        metrics = self.summarize(sums, self._targets)
        return {k if "/" in k else f"train/{k}": v.item() for k, v in metrics.items()}  # rewards/chosen has a name

    def update_metrics(self) -> dict[str, float]:
        """How the weights were last moved: learning rate, norm of the gradient, of each group where there are several."""
        metrics = {"train/lr": self.lr, "train/grad_norm": self.grad_norm.item()}
        metrics |= {f"train/grad_norm/{name}": norm.item() for name, norm in self.group_norms.items()}
        return metrics if self._scaler() is None else {**metrics, "train/skipped_steps": self.skipped}

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.count_validated(batch, self.step(batch))

    def count_validated(self, batch: Batch, sums: Metrics) -> None:
        """Add a batch to the validation under way."""
        for name, value in {**sums, "targets": batch["targets"]}.items():
            self.val_sums[name] = self.val_sums.get(name, 0) + value.detach().double()

    def on_validation_epoch_end(self) -> None:
        if self.validation_cut:
            self.val_sums = {}
            return
        sums = {name: self._over_ranks(value) for name, value in self.val_sums.items()}
        self.val_sums = {}
        self.validated_at = self.trainer.global_step
        targets = sums.pop("targets")
        if targets > 0 and not torch.isfinite(sums.get("loss", targets)):
            raise LossError(f"the validation loss is not finite after step {self.trainer.global_step}")
        metrics = self.summarize(sums, targets) | self.epoch_metrics()
        step = torch.tensor(
            float(self.trainer.global_step)
        )  # else Lightning counts the last step of a fit as not yet done
        self.log_dict({"step": step, **{f"val/{k}": v.float() for k, v in metrics.items()}})

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = self.make_optimizer(self.trained())
        self._group_names = [group.get("name", str(n)) for n, group in enumerate(optimizer.param_groups)]
        if self.steps_in_backward:
            self._stepper = StepInBackward(optimizer)
        scheduler = LambdaLR(optimizer, lambda step: self.schedule(step, total_steps=self.total_steps))
        self._settings = settings_of(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _over_ranks(self, value: Tensor) -> Tensor:
        """The sum over all batches of one moment; ranks that share a batch count once."""
        copies = self.trainer.world_size // n_replicas(self.trainer)
        return self.trainer.strategy.reduce(value.clone(), reduce_op="sum") / copies


def n_replicas(trainer: L.Trainer) -> int:
    """How many processes see different batches."""
    return 1 if trainer.world_size == 1 else trainer.strategy.distributed_sampler_kwargs["num_replicas"]


def global_norm(gradients: list[Tensor]) -> Tensor:
    """The norm of all gradients together, pieces of which may lie on several meshes of processes."""
    if not gradients:
        return torch.zeros(())
    meshes: dict[object, list[Tensor]] = {}
    for gradient in gradients:
        meshes.setdefault(gradient.device_mesh if isinstance(gradient, DTensor) else None, []).append(gradient)
    norms = [torch.nn.utils.get_total_norm(group) for group in meshes.values()]
    norms = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    return norms[0] if len(norms) == 1 else torch.stack(norms).norm()
