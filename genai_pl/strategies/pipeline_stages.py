"""Pipeline stages: the blocks of a model divided among ranks, and the schedule of micro-batches through them.

A stage runs the model's own `features` with the blocks of other stages left out (`with_blocks`), so masks, positions
and dropout come from the same code as in one process; every stage has the token ids of the batch, and only hidden
states travel. Under looped schedules a rank runs several stages, p ranks apart.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from genai_pl.kernels.cross_entropy import repeatable_backward
from genai_pl.models import PipelineModel
from genai_pl.modules.token_prediction import TokenModule

if TYPE_CHECKING:
    from torch.distributed.pipelining.schedules import _PipelineSchedule

SCHEDULES = ("gpipe", "1f1b", "interleaved", "zero_bubble")
LOOPED = SCHEDULES[2:]  # those with several stages on a rank
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


def micro_batches_of(rows: int, most: int, n_ranks: int) -> int:
    """The number of micro-batches of equal size of a batch: at most `most`, and one that looped schedules can order.

    They go through n_ranks ranks in rounds, all of the same number of micro-batches.

    >>> micro_batches_of(8, 4, 1), micro_batches_of(6, 4, 1), micro_batches_of(10, 5, 2), micro_batches_of(3, 3, 4)
    (4, 2, 1, 3)
    """
    n = math.gcd(rows, most)
    return next(m for m in range(n, 0, -1) if n % m == 0 and m % max(1, m // n_ranks) == 0)


def free_storage(parameter: nn.Parameter, device: torch.device) -> None:
    """Free the memory of a parameter of another stage; its shape stays, so that optimizers number all ranks alike."""
    parameter.data = parameter.data.new_zeros((), device=device).expand(parameter.shape)


class Stage(nn.Module):
    """The objective of one micro-batch, as far as this stage computes it.

    module: the objective's module, whose model is restricted to the blocks of this stage
    stage, n_stages: this stage and their number
    precision: context of autocast
    splits_backward: gradients of weights are made after those of inputs, in a second pass through the same graph

    The output is hidden states (B, T, C); on the last stage the loss (1,), times `loss_scale`. `sums` adds up the
    objective's sums over micro-batches there.
    """

    def __init__(
        self,
        module: TokenModule,
        stage: int,
        n_stages: int,
        precision: Callable[[], AbstractContextManager],
        *,
        splits_backward: bool = False,
    ) -> None:
        super().__init__()
        self.splits_backward = splits_backward
        self.precision, self.index, self.is_last = precision, stage, stage == n_stages - 1
        self.loss_scale = torch.ones(())  # 1 / all targets of the optimizer step
        self.sums: Counter[str] = Counter()
        model: PipelineModel = module.model
        blocks = [n for n in range(len(model.blocks)) if stage_of(n, len(model.blocks), n_stages) == stage]
        received = None if stage == 0 else lambda: self._received
        self.module = copy(module)  # with a model of its own, of the same modules
        self.module._modules = {
            **module._modules,
            "model": model.with_blocks(range(blocks[0], blocks[-1] + 1), received),
        }

    def forward(self, x: Tensor, **rows: Tensor) -> Tensor:
        """Run the blocks of this stage on one micro-batch.

        x: token ids on the first stage, else the previous stage's hidden states
        rows: the batch of this micro-batch, by name
        """
        self._received = x  # what `with_blocks` feeds to the first block; unused on the first stage
        with self.precision():
            if not self.is_last:
                hidden = self.module.hidden(rows).to(self.module.model.embed.weight.dtype)
                hidden = (
                    hidden.clone() if self.splits_backward else hidden
                )  # the schedule detaches it, which no view can be
                # the schedule calls backward even where everything up to here is frozen
                return hidden if hidden.requires_grad or not self.training else hidden.requires_grad_()
            with repeatable_backward() if self.splits_backward else nullcontext():
                sums = self.module.step(rows)
        self.sums.update({name: value.detach() for name, value in sums.items()})
        return torch.stack([sums["loss"] * self.loss_scale])


class Pipeline:
    """The schedule of a batch through all stages, of which this rank runs some.

    stages: of this rank, in their order
    group: the ranks of the pipeline
    schedule: a name of SCHEDULES
    micro_batches: parts of a batch, as far as its rows allow
    """

    def __init__(self, stages: Sequence[Stage], group: dist.ProcessGroup, *, schedule: str, micro_batches: int) -> None:
        self.stages, self.group = stages, group
        self.schedule, self.micro_batches = schedule, micro_batches
        self._schedules: dict[bool, tuple[torch.Size, _PipelineSchedule]] = {}
        self._shapes: dict[bool, dict[str, torch.Size]] = {}

    def run(self, batch: Batch, loss_scale: Tensor, *, train: bool) -> Sums:
        """Sums over the targets of the batch, the same on all stages.

        loss_scale: factor of the loss (0-dimensional); with train, gradients of loss times loss_scale are accumulated
        """
        input_ids, labels = batch["input_ids"], batch["labels"]
        rows = {name: value for name, value in batch.items() if value.ndim}
        # each micro-batch adds to these sums
        for stage in self.stages:
            stage.train(train)
            stage.loss_scale, stage.sums = loss_scale, Counter()
        inputs = (input_ids,) if self.stages[0].index == 0 else ()
        target = labels if train and self.stages[-1].is_last else None
        schedule = self._schedule(input_ids, train)
        with torch.set_grad_enabled(train):
            schedule.step(*inputs, target=target, return_outputs=False, **rows)
        return self._broadcast_sums(train)

    def _schedule(self, input_ids: Tensor, train: bool) -> "_PipelineSchedule":
        """The schedule for batches of this shape, built when a shape first appears."""
        if train not in self._schedules or self._schedules[train][0] != input_ids.shape:
            self._schedules[train] = (input_ids.shape, self._build(input_ids, train))
        return self._schedules[train][1]

    def _build(self, input_ids: Tensor, train: bool) -> "_PipelineSchedule":
        """A schedule of torch for micro-batches of B / n rows; shapes are given by meta tensors, so that none are sent."""
        # imported here: it takes a third of a second
        from torch.distributed import pipelining

        # shapes of what each stage receives and sends
        B, T = input_ids.shape
        looped, n_ranks = self.schedule in LOOPED, self.group.size()
        n = micro_batches_of(B, self.micro_batches, n_ranks if looped else 1)
        model = self.stages[0].module.model
        hidden = torch.empty(B // n, T, model.config.n_embd, dtype=model.embed.weight.dtype, device="meta")
        hidden.requires_grad_(train)
        loss = torch.empty(1, device="meta", requires_grad=train)
        stages = [
            pipelining.PipelineStage(
                stage,
                stage.index,
                n_ranks * len(self.stages),
                input_ids.device,
                input_args=input_ids[: B // n].to("meta") if stage.index == 0 else hidden,
                output_args=loss if stage.is_last else hidden,
                group=self.group,
            )
            for stage in self.stages
        ]
        options = {"loss_fn": (lambda loss, _: loss.sum()) if train else None, "scale_grads": False}
        if looped:
            zero = self.schedule == "zero_bubble" and train
            kind = pipelining.ScheduleInterleavedZeroBubble if zero else pipelining.ScheduleInterleaved1F1B
            return kind(stages, n, **options)
        # 1F1B needs a micro-batch for every stage; the last rows of an epoch may be fewer
        eager = self.schedule == "1f1b" and train and n >= n_ranks
        kind = pipelining.Schedule1F1B if eager else pipelining.ScheduleGPipe
        return kind(stages[0], n, **options)

    def _broadcast_sums(self, train: bool) -> Sums:
        """The last stage's sums on all stages; their names and shapes are sent once."""
        last, sums = self.group.size() - 1, self.stages[-1].sums
        if train not in self._shapes:
            shapes = [{name: value.shape for name, value in sums.items()}]
            dist.broadcast_object_list(shapes, group=self.group, group_src=last)
            self._shapes[train] = shapes[0]
        shapes, loss_scale = self._shapes[train], self.stages[-1].loss_scale
        sizes = [shape.numel() for shape in shapes.values()]
        values = torch.zeros(sum(sizes), dtype=torch.float64, device=loss_scale.device)
        if self.stages[-1].is_last:
            values = torch.cat([sums[name].double().reshape(-1) for name in shapes])
        dist.broadcast(values, group=self.group, group_src=last)
        parts = zip(shapes.items(), values.to(loss_scale.dtype).split(sizes), strict=True)
        return {name: part.view(shape) for (name, shape), part in parts}
