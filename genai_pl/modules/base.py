"""What every objective shares: exact normalization by tokens, one optimizer and schedule, gradient norm, validation sums."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from genai_pl.errors import TrainingError
from genai_pl.names import Head

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
        self.val_sums: Metrics = {}
        self.window: Metrics = {}  # sums of the optimizer step under way
        self.finished: Metrics = {}  # sums of the last complete step
        self.grad_norm, self.lr = torch.zeros(()), 0.0  # of the last complete step
        self._targets = torch.ones(())

    @abstractmethod
    def step(self, batch: Batch) -> Metrics:
        """Sums over the targets of one batch."""

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What the optimizer is given."""
        yield from self.model.named_parameters()

    def held_metrics(self) -> Metrics:
        """Metrics of a whole validation that are no sums over its batches."""
        return {}

    def export_files(self) -> dict[str, object]:
        """JSON values to write beside the exported model, by path."""
        return {}

    def make_prompt(self, text: str) -> str:
        """What to show the model while it trains, from words of the validation text."""
        return text

    def summarize(self, sums: Metrics, targets: Tensor) -> Metrics:
        """Metrics from sums: by default each sum per target."""
        return {name: value / targets for name, value in sums.items()}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        first = not self.window
        if first:
            self._targets = self._over_ranks(batch["window_targets"])
        sums = self.step(batch)
        for name, value in sums.items():
            self.window[name] = self.window.get(name, 0) + value.detach()
        # Lightning divides by the accumulated batches and the strategy by the ranks that see different ones
        scale = self.trainer.accumulate_grad_batches * n_replicas(self.trainer)
        return sums["loss"] * (scale / self._targets.clamp(min=1))

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the global norm, keep it for the logs, and stop at a loss or gradient that is not a number."""
        grads = [p.grad for p in self.parameters() if p.grad is not None]
        self.grad_norm, self.lr = global_norm(grads), optimizer.param_groups[0]["lr"]
        self.finished, self.window = self.window, {}
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        loss = self._over_ranks(self.finished["loss"])  # so that all ranks stop, or none
        if scaler is None and not torch.isfinite(self.grad_norm + loss):
            what = "gradient" if torch.isfinite(loss) else "loss"
            raise TrainingError(f"the {what} is not finite at step {self.trainer.global_step + 1}")
        if gradient_clip_val:
            scale = (gradient_clip_val / (self.grad_norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_([_local(grad) for grad in grads], scale)

    def step_metrics(self) -> dict[str, float]:
        """Metrics of the last optimizer step, over all ranks."""
        sums = {name: self._over_ranks(value) for name, value in self.finished.items()}
        metrics = self.summarize(sums, self._targets)
        return {k if "/" in k else f"train/{k}": v.item() for k, v in metrics.items()}  # rewards/chosen has a name

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        for name, value in {**self.step(batch), "targets": batch["targets"]}.items():
            self.val_sums[name] = self.val_sums.get(name, 0) + value.detach().double()

    def on_validation_epoch_end(self) -> None:
        sums = {name: self._over_ranks(value) for name, value in self.val_sums.items()}
        self.val_sums = {}
        self.validated_at = self.trainer.global_step
        metrics = self.summarize(sums, sums.pop("targets")) | self.held_metrics()
        step = torch.tensor(
            float(self.trainer.global_step)
        )  # else Lightning counts the last step of a fit as not yet done
        self.log_dict({"step": step, **{f"val/{k}": v.float() for k, v in metrics.items()}})

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = self.make_optimizer(self.trained())
        scheduler = LambdaLR(optimizer, lambda step: self.schedule(step, total_steps=self.total_steps))
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
    meshes: dict[object, list[Tensor]] = {}
    for gradient in gradients:
        meshes.setdefault(gradient.device_mesh if isinstance(gradient, DTensor) else None, []).append(gradient)
    norms = [torch.nn.utils.get_total_norm(group) for group in meshes.values()]
    norms = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    return norms[0] if len(norms) == 1 else torch.stack(norms).norm()


def _local(gradient: Tensor) -> Tensor:
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient
