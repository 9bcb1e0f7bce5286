"""Pipeline parallelism: each rank holds neighbouring blocks, and micro-batches travel from rank to rank.

Every rank builds the whole model and optimizer, then frees the storage of the parameters of other stages: names,
shapes and numbers stay those of one process, so optimizers, exports and checkpoints need no translation. torch's
schedules run forward and backward passes; Lightning's `training_step` therefore computes nothing, and `backward` runs
the whole schedule.
"""

from collections.abc import Callable, Mapping

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from genai_pl.checkpoints.optimizer_state import parameters_by_number, restore_state
from genai_pl.config.enums import Position
from genai_pl.errors import CheckpointError, ConfigError
from genai_pl.models.transformer import Transformer
from genai_pl.modules.base import BaseModule, Batch, global_norm
from genai_pl.modules.token_prediction import TokenModule
from genai_pl.strategies.pipeline_stages import (
    LOOPED,
    SCHEDULES,
    Pipeline,
    Stage,
    free_storage,
    micro_batches_of,
    parameter_stages,
)
from genai_pl.strategies.sharded import ShardedStrategy


class PipelineStrategy(ShardedStrategy):
    """The blocks of a model divided among ranks (GPipe: Huang et al. 2019; 1F1B: Narayanan et al. 2019).

    schedule: gpipe (all forward passes first), 1f1b (a backward pass as soon as possible, fewer activations), or with several
        stages on each rank interleaved (1F1B, shorter waits: Narayanan et al. 2021) and zero_bubble (gradients of weights
        fill the waits: Qi et al. 2024)
    microbatches: parts of a batch; data.batch_size must be a multiple
    data_parallel_size: pipelines that see different batches
    pipeline_parallel_size: ranks of a pipeline; None: what data_parallel_size leaves of the ranks
    stages_per_rank: of the last two schedules; None: 2 for them, 1 for others

    The ranks of a pipeline receive the same batch. A checkpoint is that of one process: a run resumes with any number
    of ranks.
    """

    shared_size = "pipeline_parallel_size"

    def __init__(
        self,
        *,
        schedule: str = "1f1b",
        microbatches: int = 4,
        data_parallel_size: int | None = 1,
        pipeline_parallel_size: int | None = None,
        stages_per_rank: int | None = None,
    ) -> None:
        if schedule not in SCHEDULES:
            raise ConfigError(f"strategy.schedule={schedule}: {' or '.join(SCHEDULES)}")
        looped = schedule in LOOPED
        if stages_per_rank is not None and (stages_per_rank < 1 or (stages_per_rank > 1) != looped):
            fit = "2 or more" if looped else "1"
            raise ConfigError(f"strategy.stages_per_rank={stages_per_rank}: {fit} under strategy.schedule={schedule}")
        if microbatches < 1:
            raise ConfigError(f"strategy.microbatches={microbatches}: at least 1")
        super().__init__(data_parallel_size=data_parallel_size, tensor_parallel_size=pipeline_parallel_size)
        self.schedule, self.micro_batches = schedule, microbatches
        self.stages_per_rank = stages_per_rank or 1 + looped
        self._stages_of: dict[nn.Parameter, tuple[int, ...]] = {}
        self._groups: dict[tuple[int, ...], dist.ProcessGroup] = {}  # of stages that hold the same parameter
        self._batch: Batch = {}

    @property
    def stage(self) -> int:
        """The number of this rank in its pipeline, which is that of its first stage."""
        return self.global_rank % self.sizes[1]

    def check(self, module: BaseModule, *, rows: int) -> None:
        """Also ConfigError where micro-batches do not divide a batch, or are fewer than the stages under 1f1b."""
        super().check(module, rows=rows)
        if rows % self.micro_batches:
            raise ConfigError(
                f"data.batch_size ({rows}) must be a multiple of strategy.microbatches ({self.micro_batches})"
            )
        if self.schedule == "1f1b" and self.micro_batches < self.sizes[1]:
            raise ConfigError(
                f"strategy.microbatches ({self.micro_batches}) must be at least strategy.pipeline_parallel_size "
                f"({self.sizes[1]}) under schedule=1f1b"
            )
        if self.schedule in LOOPED and micro_batches_of(rows, self.micro_batches, self.sizes[1]) != self.micro_batches:
            raise ConfigError(
                f"strategy.microbatches ({self.micro_batches}) must be a multiple of strategy.pipeline_parallel_size "
                f"({self.sizes[1]}) under schedule={self.schedule}"
            )

    def _check_model(self, module: BaseModule) -> None:
        """ConfigError for an objective, model, adapter or precision that a pipeline cannot train."""
        model, stages, instead = module.model, self.sizes[1] * self.stages_per_rank, "use strategy=fsdp here"
        if not isinstance(module, TokenModule) or not module.divisible:
            raise ConfigError(f"strategy=pipeline is for clm, sft, fim, prefix_lm and mlm; {instead}")
        if not isinstance(model, Transformer) or model.config.position is Position.xl:
            raise ConfigError(
                f"strategy=pipeline divides decoders and encoders of our own, without position=xl; {instead}"
            )
        # blocks to divide, and nothing outside of blocks that every stage would need
        if model.config.share_layers or model.config.n_layer < stages:
            raise ConfigError(
                f"model.n_layer ({model.config.n_layer}, share_layers={model.config.share_layers}): strategy=pipeline "
                f"needs layers of their own for each of {stages} stages"
            )
        if model.config.n_experts:
            raise ConfigError(
                f"model.n_experts: strategy=pipeline carries no auxiliary losses between stages; {instead}"
            )
        if model.virtual is not None:
            raise ConfigError(
                f"strategy=pipeline: virtual tokens (peft=prompt, peft=prefix) belong to no stage; {instead}"
            )
        if self.precision_plugin.precision == "16-mixed":
            raise ConfigError("precision=fp16: strategy=pipeline does not scale losses; precision=bf16")

    def _split(self, module: L.LightningModule) -> None:
        """Keep the parameters and blocks of this stage, in place; a collective, as it creates process groups."""
        # free the parameters of other ranks' stages
        n_ranks, stage = self.sizes[1], self.stage
        n_stages = n_ranks * self.stages_per_rank
        holders = parameter_stages(module.model, n_stages).items()
        self._stages_of = {p: tuple(sorted({index % n_ranks for index in stages})) for p, stages in holders}
        for parameter, stages in self._stages_of.items():
            if stage not in stages:
                free_storage(parameter, parameter.device)
        # groups of stages that share a parameter (tied embeddings), and of each pipeline for objects
        pipelines = self.device_mesh.mesh.tolist()  # (data, stages) ranks
        shared = sorted({stages for stages in self._stages_of.values() if len(stages) > 1})
        for stages in shared:
            self._groups[stages] = self._group_of_this_rank([[ranks[s] for s in stages] for ranks in pipelines])
        self._cpu_group = self._group_of_this_rank(pipelines, backend="gloo")
        torch.manual_seed(torch.initial_seed() + stage)  # dropout differs from block to block
        group = self.device_mesh["tensor_parallel"].get_group()
        # the schedule of this rank's stages
        options = {
            "precision": self.precision_plugin.forward_context,
            "splits_backward": self.schedule == "zero_bubble",
        }
        parts = [Stage(module, index, n_stages, **options) for index in range(stage, n_stages, n_ranks)]
        self._pipeline = Pipeline(parts, group, schedule=self.schedule, micro_batches=self.micro_batches)
        module.global_norm = self._global_norm

    def _group_of_this_rank(self, groups: list[list[int]], **options: str) -> dist.ProcessGroup | None:
        """The one of some process groups that this rank is in; all ranks must create all of them."""
        created = [dist.new_group(ranks, **options) for ranks in groups]
        return next((group for group, ranks in zip(created, groups, strict=True) if self.global_rank in ranks), None)

    def _is_local(self, parameter: Tensor) -> bool:
        """Whether this stage computes with a parameter."""
        return self.stage in self._stages_of[parameter]

    def model_to_device(self) -> None:
        """Move this stage's parameters and all buffers; the others stay without storage."""
        for parameter in self._stages_of:
            if self._is_local(parameter):
                parameter.data = parameter.data.to(self.root_device)
            else:
                free_storage(parameter, self.root_device)
        for buffer in self.model.buffers():
            buffer.data = buffer.data.to(self.root_device)

    def training_step(self, batch: Batch, *_: object) -> Tensor:
        """Keep the batch for `backward`, which interleaves forward and backward passes."""
        self._batch = batch
        return torch.zeros((), device=self.root_device)

    def backward(self, closure_loss: Tensor, *_: object, **__: object) -> Tensor:
        """Run the schedule on the kept batch, which accumulates gradients, and count its sums."""
        module = self.lightning_module
        sums = self._pipeline.run(self._batch, 1 / module.step_targets(self._batch), train=True)
        module.accumulate(sums)
        return closure_loss

    def validation_step(self, batch: Batch, *_: object) -> None:
        """Run the forward passes of a batch and count its sums, which all stages get."""
        module = self.lightning_module
        module.count_validated(batch, self._pipeline.run(batch, torch.ones((), device=self.root_device), train=False))

    def optimizer_step(
        self, optimizer: Optimizer, closure: Callable[[], object], model: nn.Module | None = None, **kwargs: object
    ) -> object:
        """Also sum gradients over stages and pipelines, between the closure (backward) and the step."""

        def closure_with_summed_gradients() -> object:
            loss = closure()
            self._sum_gradients()
            return loss

        return super().optimizer_step(optimizer, closure_with_summed_gradients, model, **kwargs)

    def _sum_gradients(self) -> None:
        """Sum the gradients of shared parameters over their stages, and of all over pipelines with other batches."""
        data = self.device_mesh["data_parallel"]
        for parameter, stages in self._stages_of.items():
            if not parameter.requires_grad or not self._is_local(parameter):
                continue
            if parameter.grad is None and len(stages) > 1:  # another stage has one: the collective needs both
                parameter.grad = torch.zeros_like(parameter)
            if len(stages) > 1:
                dist.all_reduce(parameter.grad, group=self._groups[stages])
            if data.size() > 1 and parameter.grad is not None:
                dist.all_reduce(parameter.grad, group=data.get_group())

    def _global_norm(self, gradients: list[Tensor]) -> Tensor:
        """The gradient norm over all stages, in which a parameter of several stages counts once."""
        counted_elsewhere = {id(p.grad) for p, stages in self._stages_of.items() if self.stage in stages[1:]}
        own = global_norm([gradient for gradient in gradients if id(gradient) not in counted_elsewhere])
        square = own.to(self.root_device).double() ** 2
        dist.all_reduce(square, group=self._pipeline.group)
        return square.sqrt().to(own.dtype)

    def _collect(self, own: dict) -> dict:
        """On the first rank the values of all stages of its pipeline, by key; nothing on others. A collective."""
        if self.global_rank >= self.sizes[1]:
            return {}
        parts: list[dict] | None = [{}] * self.sizes[1] if self.is_global_zero else None
        dist.gather_object(own, parts, group=self._cpu_group, group_dst=0)
        return {key: value for part in reversed(parts or []) for key, value in part.items()}

    def gather(self) -> None:
        """Give the first rank all parameters, in RAM, for the export; a collective."""
        named = dict(self.lightning_module.named_parameters())
        collected = self._collect({name: p.detach().cpu() for name, p in named.items() if self._is_local(p)})
        for name, value in collected.items():
            named[name].data = value

    def lightning_module_state_dict(self) -> dict[str, Tensor]:
        """The full state dict on the first rank, {} on others; a collective."""
        state = self.lightning_module.state_dict(keep_vars=True)
        # one copy per tensor: a tied weight stays tied
        copies = {value: value.detach().cpu() for value in state.values() if self._is_on_this_stage(value)}
        collected = self._collect({name: copies[value] for name, value in state.items() if value in copies})
        return {name: collected[name] for name in state} if self.is_global_zero else {}

    def _is_on_this_stage(self, value: Tensor) -> bool:
        """Whether a tensor of the state dict is a parameter of this stage, or a buffer, which all stages have."""
        return value not in self._stages_of or self._is_local(value)

    def load_model_state_dict(self, checkpoint: Mapping[str, object], strict: bool = True) -> None:
        """Load this stage's part of a full checkpoint; CheckpointError where keys differ."""
        module, saved = self.lightning_module, checkpoint["state_dict"]
        own = module.state_dict(keep_vars=True)
        if strict and (differing := own.keys() ^ saved.keys()):
            raise CheckpointError(f"the checkpoint is of another model: only one of them has {min(differing)}")
        own_values = {name: value for name, value in saved.items() if name in own and self._is_on_this_stage(own[name])}
        module.load_state_dict(own_values, strict=False)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, object]:
        """The state of all stages on the first rank, in RAM, by parameter number; a collective."""
        state = super().optimizer_state(optimizer)
        own = {n: {k: _on_cpu(v) for k, v in values.items()} for n, values in state["state"].items()}
        return {**state, "state": dict(sorted(self._collect(own).items()))}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, object]) -> None:
        """Load the states of this stage's parameters."""
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = parameters_by_number(optimizer, saved)
            own_values = {n: values for n, values in saved["state"].items() if self._is_local(parameters[n])}
            restore_state(optimizer, {**saved, "state": own_values})


def _on_cpu(value: object) -> object:
    return value.cpu() if isinstance(value, Tensor) else value
