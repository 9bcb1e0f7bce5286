"""Pipeline stages: the blocks of a model divided among ranks, and the schedule of micro-batches through them.

A stage runs the model's own `features` with the blocks of other stages skipped (`keep_blocks`), so masks, positions
and dropout come from the same code as in one process; every stage has the token ids of the batch, and only hidden
states travel.
"""

import math
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from genai_pl.models import PipelineModel
from genai_pl.modules.token_prediction import TokenModule

if TYPE_CHECKING:
    from torch.distributed.pipelining.schedules import PipelineScheduleSingle

SCHEDULES = ("gpipe", "1f1b")
Batch = dict[str, Tensor]
Sums = dict[str, Tensor]


def parameter_stages(model: PipelineModel, n_stages: int) -> dict[nn.Parameter, tuple[int, ...]]:
    """The stages that compute with each parameter, ascending: one for a block's, first and last for a tied embedding.

    A parameter outside of blocks, inputs and outputs (T5's bias table) belongs to all stages.
    """
    parts = [(module, 0) for module in model.input_modules]
    parts += [(block, stage_of(n, len(model.blocks), n_stages)) for n, block in enumerate(model.blocks)]
    parts += [(module, n_stages - 1) for module in model.output_modules]
    stages_of: dict[nn.Parameter, set[int]] = {}
    for module, stage in parts:
        for parameter in module.parameters():
            stages_of.setdefault(parameter, set()).add(stage)
    everywhere = range(n_stages)  # such as T5's bias table, which every block looks up
    return {parameter: tuple(sorted(stages_of.get(parameter, everywhere))) for parameter in model.parameters()}


def stage_of(block: int, n_blocks: int, n_stages: int) -> int:
    """The stage of a block: neighbours together, equally many blocks on each, or one fewer on the first ones.

    >>> [stage_of(block, 5, 2) for block in range(5)]
    [0, 0, 1, 1, 1]
    """
    return ((block + 1) * n_stages - 1) // n_blocks


def free_storage(parameter: nn.Parameter, device: torch.device) -> None:
    """Free the memory of a parameter of another stage; its shape stays, so that optimizers number all ranks alike."""
    parameter.data = parameter.data.new_zeros((), device=device).expand(parameter.shape)


class Stage(nn.Module):
    """The objective of one micro-batch, as far as this stage computes it.

    module: the objective's module, whose model is restricted to the blocks of this stage
    stage, n_stages: this stage and their number
    precision: context of autocast

    The output is hidden states (B, T, C); on the last stage the loss (1,), times `loss_scale`. `sums` adds up the
    objective's sums over micro-batches there.
    """

    def __init__(
        self, module: TokenModule, stage: int, n_stages: int, precision: Callable[[], AbstractContextManager]
    ) -> None:
        super().__init__()
        self.module, self.precision = module, precision
        self.is_last = stage == n_stages - 1
        self.loss_scale = torch.ones(())  # 1 / all targets of the optimizer step
        self.sums: Counter[str] = Counter()
        model: PipelineModel = module.model
        blocks = [n for n in range(len(model.blocks)) if stage_of(n, len(model.blocks), n_stages) == stage]
        model.keep_blocks(range(blocks[0], blocks[-1] + 1), None if stage == 0 else lambda: self._received)

    def forward(self, x: Tensor, **rows: Tensor) -> Tensor:
        """Run the blocks of this stage on one micro-batch.

        x: token ids on the first stage, else the previous stage's hidden states
        rows: the batch of this micro-batch, by name
        """
        self._received = x  # what `keep_blocks` feeds to the first block; unused on the first stage
        with self.precision():
            if not self.is_last:
                hidden = self.module.hidden(rows).to(self.module.model.embed.weight.dtype)
                # the schedule calls backward even where everything up to here is frozen
                return hidden if hidden.requires_grad or not self.training else hidden.requires_grad_()
            sums = self.module.step(rows)
        self.sums.update({name: value.detach() for name, value in sums.items()})
        return (sums["loss"] * self.loss_scale)[None]


class Pipeline:
    """The schedule of a batch through all stages, of which this rank runs one.

    stage, index: this rank's stage and its number
    group: the ranks of the pipeline
    schedule: gpipe or 1f1b
    micro_batches: parts of a batch, as far as its rows allow
    """

    def __init__(
        self, stage: Stage, index: int, group: dist.ProcessGroup, *, schedule: str, micro_batches: int
    ) -> None:
        self.stage, self.index, self.group = stage, index, group
        self.schedule, self.micro_batches = schedule, micro_batches
        self._schedules: dict[bool, tuple[torch.Size, PipelineScheduleSingle]] = {}
        self._shapes: dict[bool, dict[str, torch.Size]] = {}

    def run(self, batch: Batch, loss_scale: Tensor, *, train: bool) -> Sums:
        """Sums over the targets of the batch, the same on all stages.

        loss_scale: factor of the loss (0-dimensional); with train, gradients of loss times loss_scale are accumulated
        """
        input_ids, labels = batch["input_ids"], batch["labels"]
        rows = {name: value for name, value in batch.items() if value.ndim}
        # each micro-batch adds to these sums
        self.stage.train(train)
        self.stage.loss_scale = loss_scale
        self.stage.sums = Counter()
        inputs = (input_ids,) if self.index == 0 else ()
        target = labels if train and self.stage.is_last else None
        schedule = self._schedule(input_ids, train)
        with torch.set_grad_enabled(train):
            schedule.step(*inputs, target=target, return_outputs=False, **rows)
        return self._broadcast_sums(train)

    def _schedule(self, input_ids: Tensor, train: bool) -> "PipelineScheduleSingle":
        """The schedule for batches of this shape, built when a shape first appears."""
        if train not in self._schedules or self._schedules[train][0] != input_ids.shape:
            self._schedules[train] = (input_ids.shape, self._build(input_ids, train))
        return self._schedules[train][1]

    def _build(self, input_ids: Tensor, train: bool) -> "PipelineScheduleSingle":
        """A schedule of torch for micro-batches of B / n rows; shapes are given by meta tensors, so that none are sent."""
        # imported here: it takes a third of a second
        from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

        # shapes of what this stage receives and sends
        B, T = input_ids.shape
        n_stages, n = self.group.size(), math.gcd(B, self.micro_batches)
        model = self.stage.module.model
        hidden = torch.empty(B // n, T, model.config.n_embd, dtype=model.embed.weight.dtype, device="meta")
        hidden.requires_grad_(train)
        loss = torch.empty(1, device="meta", requires_grad=train)
        stage = PipelineStage(
            self.stage,
            self.index,
            n_stages,
            input_ids.device,
            input_args=input_ids[: B // n].to("meta") if self.index == 0 else hidden,
            output_args=loss if self.stage.is_last else hidden,
            group=self.group,
        )
        # 1F1B needs a micro-batch for every stage; the last rows of an epoch may be fewer
        kind = Schedule1F1B if self.schedule == "1f1b" and train and n >= n_stages else ScheduleGPipe
        return kind(stage, n, loss_fn=(lambda loss, _: loss.sum()) if train else None, scale_grads=False)

    def _broadcast_sums(self, train: bool) -> Sums:
        """The last stage's sums on all stages; their names and shapes are sent once."""
        last, sums = self.group.size() - 1, self.stage.sums
        if train not in self._shapes:
            shapes = [{name: value.shape for name, value in sums.items()}]
            dist.broadcast_object_list(shapes, group=self.group, group_src=last)
            self._shapes[train] = shapes[0]
        shapes, loss_scale = self._shapes[train], self.stage.loss_scale
        sizes = [shape.numel() for shape in shapes.values()]
        values = torch.zeros(sum(sizes), dtype=torch.float64, device=loss_scale.device)
        if self.stage.is_last:
            values = torch.cat([sums[name].double().reshape(-1) for name in shapes])
        dist.broadcast(values, group=self.group, group_src=last)
        parts = zip(shapes.items(), values.to(loss_scale.dtype).split(sizes), strict=True)
        return {name: part.view(shape) for (name, shape), part in parts}
