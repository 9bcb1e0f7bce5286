"""FSDP2, tensor parallelism, and both at once, on GPUs and on the CPU.

A mesh (data_parallel, tensor_parallel) numbers the ranks. Along the first dimension FSDP2 shards parameters, gradients
and optimizer states (Zhao et al. 2023) and ranks see different batches, or under context parallelism different tokens of
one (`context_parallel.py`); along the second, layers are divided (`tensor_parallel.py`) and ranks share a batch.
Checkpoints are full by default, as one process would write them, so a run can resume on any number of ranks.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.optim import Optimizer

from genai_pl.checkpoints.file import read_contents
from genai_pl.checkpoints.optimizer_state import restore_state, saved_state, shard_templates
from genai_pl.distributed.context_group import ContextGroup
from genai_pl.distributed.dtensor import full_tensor_on_cpu, local_shard, move_unsharded, shard_like
from genai_pl.distributed.tensor_parallel_group import average, sum_gradients
from genai_pl.errors import ConfigError
from genai_pl.models.experts import Router
from genai_pl.modules.distillation import DistillModule
from genai_pl.modules.rollout_module import RolloutModule
from genai_pl.modules.token_prediction import TokenModule
from genai_pl.peft.quantize import QuantizedLinear
from genai_pl.strategies.context_parallel import check_sequences, split_sequences
from genai_pl.strategies.expert_parallel import check_experts, expert_mesh, split_experts
from genai_pl.strategies.fsdp_gather import gather_parameters, unsharded
from genai_pl.strategies.quantized_shards import prepare_shards
from genai_pl.strategies.tensor_parallel import check_split, split_model

NAMES = ("batch", "context", "tensor")  # dimensions of the mesh that has context groups


class ShardedStrategy(ModelParallelStrategy):
    """Parameters, gradients and optimizer states sharded over a (data_parallel, tensor_parallel) mesh of ranks.

    data_parallel_size, tensor_parallel_size: of the mesh; None: what the other leaves of the ranks
    replicate_size: groups of ranks that hold the same shards (hybrid sharding); divides data_parallel_size
    reshard_after_forward: free a block's gathered weights after its forward pass, and gather them again for the
        backward pass
    cpu_offload: keep shards in RAM, and step them there
    sharded_checkpoints: a folder of shards instead of one file
    async_checkpoints: go on while a copy is being written
    sequence_parallel: also shard hidden states along the sequence, within a tensor-parallel group
    expert_parallel_size: data-parallel ranks that hold the experts of a mixture between them
    context_parallel_size: ranks that divide the tokens of each row of a batch between them
    """

    shared_size = "tensor_parallel_size"  # the option for the number of ranks that share a batch

    def __init__(
        self,
        *,
        data_parallel_size: int | None = None,
        tensor_parallel_size: int | None = 1,
        replicate_size: int = 1,
        reshard_after_forward: bool = True,
        cpu_offload: bool = False,
        sharded_checkpoints: bool = False,
        async_checkpoints: bool = False,
        sequence_parallel: bool = False,
        expert_parallel_size: int = 1,
        context_parallel_size: int = 1,
    ) -> None:
        if context_parallel_size < 1:
            raise ConfigError(f"strategy.context_parallel_size={context_parallel_size}: at least 1")
        if async_checkpoints and not sharded_checkpoints:
            raise ConfigError("strategy.async_checkpoints needs strategy.sharded_checkpoints=true")
        backend = "cpu:gloo,cuda:nccl" if cpu_offload and torch.cuda.is_available() else None
        super().__init__(save_distributed_checkpoint=False, process_group_backend=backend)
        self._requested_sizes, self.replicate_size = (data_parallel_size, tensor_parallel_size), replicate_size
        self.reshard_after_forward, self.cpu_offload = reshard_after_forward, cpu_offload
        self.sharded_checkpoints, self.async_checkpoints = sharded_checkpoints, async_checkpoints
        self.sequence_parallel, self.expert_parallel_size = sequence_parallel, expert_parallel_size
        self.context_parallel_size = context_parallel_size
        self._is_split, self._saver = False, None
        self._context_group: ContextGroup | None = None  # of this rank, from `setup_environment`
        # unsharded in a tensor-parallel group, each rank of which computes a part of their gradient
        self._shared: list[nn.Parameter] = []

    @property
    def sizes(self) -> tuple[int, int]:
        """Ranks that see different tokens, whose weights FSDP shards, and ranks that see the same."""
        data, tensor = self._requested_sizes
        n_processes, context = self.num_processes * self.num_nodes, self.context_parallel_size
        if tensor is None:
            tensor = n_processes // ((data or 1) * context)
        return data * context if data else n_processes // max(tensor, 1), tensor

    @property
    def gathers(self) -> bool:
        """Whether one rank can hold the full model for a while, to generate text: not where layers are divided."""
        return self._requested_sizes[1] == self.expert_parallel_size == self.context_parallel_size == 1

    @property
    def distributed_sampler_kwargs(self) -> dict[str, int]:
        """Number of replicas and the replica of this rank, for the data loader."""
        (data, tensor), context = self.sizes, self.context_parallel_size
        return {"num_replicas": data // context, "rank": self.global_rank // (context * tensor)}

    def check(self, module: L.LightningModule, *, rows: int) -> None:
        """ConfigError for an objective, model, sizes or batch that do not fit, before any process is started.

        rows: of a batch
        """
        (data, shared), context = self.sizes, self.context_parallel_size
        n_processes = self.num_processes * self.num_nodes
        if data * shared != n_processes or data % context:
            of_context = f" x strategy.context_parallel_size ({context})" if context > 1 else ""
            raise ConfigError(
                f"strategy.data_parallel_size ({max(1, data // context)}){of_context} x strategy.{self.shared_size} "
                f"({shared}) must be the number of processes, trainer.devices x trainer.num_nodes ({n_processes})"
            )
        if shared > 1 and any(isinstance(layer, QuantizedLinear) for layer in module.model.modules()):
            raise ConfigError(
                "peft.quantize: a quantized base cannot be divided by layer; use trainer=fsdp or trainer=ddp"
            )
        self._check_model(module)

    def _check_model(self, module: L.LightningModule) -> None:
        """ConfigError for sizes and models that sharding or tensor parallelism cannot take."""
        data, tensor = self.sizes
        if self.replicate_size < 1 or data % self.replicate_size:
            raise ConfigError(
                f"strategy.replicate_size ({self.replicate_size}) must divide strategy.data_parallel_size ({data})"
            )
        if tensor > 1 and not (isinstance(module, TokenModule) and module.divisible):
            raise ConfigError(
                f"strategy.tensor_parallel_size ({tensor}) is for objectives that predict tokens; use strategy=fsdp here"
            )
        if tensor > 1:
            check_split(module.model, tensor, sequence_parallel=self.sequence_parallel)
        elif self.sequence_parallel:
            raise ConfigError("strategy.sequence_parallel needs strategy.tensor_parallel_size above 1")
        if self.expert_parallel_size != 1:
            self._check_experts(module)
        if self.context_parallel_size > 1:
            check_sequences(type(module), module.models(), self.context_parallel_size)

    def _check_experts(self, module: L.LightningModule) -> None:
        """ConfigError for sizes, objectives and models that expert parallelism cannot take."""
        (data, tensor), option = self.sizes, f"strategy.expert_parallel_size ({self.expert_parallel_size})"
        if tensor > 1:
            raise ConfigError(f"{option}: strategy.tensor_parallel_size must be 1")
        if isinstance(module, RolloutModule) or (isinstance(module, DistillModule) and module.student_fraction):
            raise ConfigError(f"{option}: no process holds the whole model to write completions; set it to 1 here")
        sizes = {"data": data, "replicate": self.replicate_size, "size": self.expert_parallel_size}
        check_experts(module.model, **sizes)
        for beside in module.models()[1:]:  # the reference, which may be dense
            if beside.config.n_experts:
                check_experts(beside, **sizes)

    def setup_environment(self) -> None:
        """Create process groups and the mesh, with three dimensions for hybrid sharding."""
        self._data_parallel_size, self._tensor_parallel_size = self.sizes
        super().setup_environment()
        data, tensor = self.sizes
        if self.replicate_size > 1:
            sizes = (self.replicate_size, data // self.replicate_size, tensor)
            names = ("replicate", "shard", "tensor_parallel")
            mesh = init_device_mesh(self.root_device.type, sizes, mesh_dim_names=names)
            mesh["replicate", "shard"]._flatten("data_parallel")
            self._device_mesh = mesh
        if self.expert_parallel_size > 1:
            sizes = {"data": data, "replicate": self.replicate_size, "size": self.expert_parallel_size}
            self._expert_mesh = expert_mesh(self.root_device.type, **sizes)
        if (context := self.context_parallel_size) > 1:
            mesh = init_device_mesh(self.root_device.type, (data // context, context, tensor), mesh_dim_names=NAMES)
            self._context_group = ContextGroup.of(mesh["context"].get_group())

    def setup(self, trainer: L.Trainer) -> None:
        """Shard the model once, create the saver of sharded checkpoints, then set up as Lightning does."""
        if not self._is_split:  # a validation after the fit sets up again
            self.model = self.precision_plugin.convert_module(self.model)
            self._split(self.lightning_module)
            self._is_split = True
        if self.sharded_checkpoints and self._saver is None:
            from genai_pl.checkpoints.sharded import ShardedSaver  # DCP takes half a second to import

            self._saver = ShardedSaver(asynchronous=self.async_checkpoints)
        super(ModelParallelStrategy, self).setup(
            trainer
        )  # ModelParallelStrategy expects configure_model to shard the module

    def teardown(self) -> None:
        """Wait for a checkpoint that is being written."""
        if self._saver is not None:
            self._saver.wait()
        super().teardown()

    def _split(self, module: L.LightningModule) -> None:
        """Divide layers along the tensor dimension, then shard along the data dimension, in place.

        Parameters that stay unsharded over replicas get a hook that averages their gradients, as FSDP does for its
        own.
        """
        # it warns that a tensor sharded over two dimensions is gathered in two steps, as it must be
        logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
        data, tensor = self.device_mesh["data_parallel"], self.device_mesh["tensor_parallel"]
        shared, models = [], module.models()  # the model, and a reference or critic beside it
        if tensor.size() > 1:
            shared = split_model(module.model, tensor, sequence_parallel=self.sequence_parallel)
        for model in models if self._context_group else ():
            split_sequences(model, self._context_group)
        # FSDP over the data dimension
        divided = {parameter for model in models for parameter in model.parameters()}
        replicated = [parameter for parameter in module.parameters() if parameter not in divided]
        if data.size() > 1 or tensor.size() == 1:
            mesh = self.device_mesh["replicate", "shard"] if self.replicate_size > 1 else data
            replicated += [parameter for model in models for parameter in self._shard(model, mesh)]
        if self.gathers:
            module.unsharded_model = partial(unsharded, module.model, reshard=self.reshard_after_forward)
        # gradients that FSDP does not reduce
        for parameter in replicated:
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda p: average(local_shard(p.grad), data.get_group()))
        self._shared = [getattr(part, name) for part, name in shared]  # by name: FSDP has replaced parameters

    def _shard(self, model: nn.Module, mesh: DeviceMesh) -> list[nn.Parameter]:
        """Shard a model with FSDP2, in place; returns the parameters that stay unsharded on every rank."""
        # inputs keep their dtype: positions in bfloat16 would be rounded
        policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
        options, block_policy, ignored = {"mesh": mesh}, policy, []
        if self.precision_plugin.precision == "bf16-mixed":
            # norms, biases and routers stay unsharded: gathered with the rest of a block they would be rounded, and norms
            # compute in the dtype of their weight, while a rounded router sends tokens elsewhere
            routers = {module.weight for module in model.modules() if isinstance(module, Router)}
            ignored = [parameter for parameter in model.parameters() if parameter.ndim < 2 or parameter in routers]
            block_policy = replace(policy, param_dtype=torch.bfloat16)
        ignored += prepare_shards(model, mesh.size(-1))
        options["ignored_params"] = set(ignored)
        if self.cpu_offload:
            options["offload_policy"] = CPUOffloadPolicy(pin_memory=torch.cuda.is_available())
        if self.expert_parallel_size > 1:
            own = {**options, "reshard_after_forward": self.reshard_after_forward}
            split_experts(model, self._expert_mesh, block_policy, **{k: v for k, v in own.items() if k != "mesh"})
        for block in dict.fromkeys(model.blocks):
            fully_shard(block, reshard_after_forward=self.reshard_after_forward, mp_policy=block_policy, **options)
        # embeddings, last norm and head stay gathered until the backward pass, as losses read the head's weight, and
        # in float32, as everything that is added to embeddings
        fully_shard(model, reshard_after_forward=False, mp_policy=policy, **options)
        # objectives call these instead of `forward`: the weights that belong to no block are gathered on the way in
        for name in model.feature_methods:
            register_fsdp_forward_method(model, name)
        return ignored

    def optimizer_step(
        self, optimizer: Optimizer, closure: Callable[[], object], model: nn.Module | None = None, **kwargs: object
    ) -> object:
        """Also sum the gradients of parameters that a tensor-parallel group shares, between backward and step."""

        def closure_with_shared_gradients() -> object:
            loss = closure()
            if self._shared:
                sum_gradients(self._shared, self.device_mesh["tensor_parallel"].get_group())
            return loss

        return super().optimizer_step(optimizer, closure_with_shared_gradients, model, **kwargs)

    def model_to_device(self) -> None:
        """Move the model; with CPU offload the unsharded tensors only."""
        if self.cpu_offload:
            move_unsharded(self.model, self.root_device)
        else:
            super().model_to_device()

    def gather(self) -> None:
        """Give the first rank all parameters in full, in place and in RAM, for the export; a collective."""
        gather_parameters(self.lightning_module.model)

    def lightning_module_state_dict(self) -> dict[str, Tensor]:
        """The state dict for a checkpoint: of shards, or full on the first rank and {} on others. A collective."""
        state = self.lightning_module.state_dict(keep_vars=True)
        if self._saver is not None:
            return state
        copies: dict[Tensor, Tensor] = {}
        for value in dict.fromkeys(state.values()):  # one copy per tensor: a tied weight stays tied
            full = full_tensor_on_cpu(value.detach())
            if self.is_global_zero:
                copies[value] = full
        return {name: copies[value] for name, value in state.items()} if self.is_global_zero else {}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, object]:
        """The state of an optimizer for a checkpoint, sharded or full; a collective."""
        inner = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        return saved_state(inner, sharded=self._saver is not None)

    def save_checkpoint(self, checkpoint: dict, filepath: str | Path, storage_options: object = None) -> None:
        """Write one file from the first rank, or a folder from all ranks."""
        if self._saver is None:
            super(ModelParallelStrategy, self).save_checkpoint(checkpoint, filepath)
        else:
            self._saver.save(checkpoint, Path(filepath), self.checkpoint_io.written)

    @property
    def lightning_restore_optimizer(self) -> bool:
        """True: Lightning calls `load_optimizer_state_dict`."""
        return True

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, object]:
        """The contents of a file, full, or of a folder, each tensor sharded as this run needs it."""
        path = Path(checkpoint_path)
        if not path.is_dir():
            return super(ModelParallelStrategy, self).load_checkpoint(path, weights_only)
        from genai_pl.checkpoints.sharded import load_shards

        contents, weights = read_contents(path), self.lightning_module.state_dict(keep_vars=True)
        return load_shards(path, contents, shard_templates(contents, weights, self.optimizers))

    def load_model_state_dict(self, checkpoint: Mapping[str, object], strict: bool = True) -> None:
        """Load weights that are full or sharded; full ones are sharded here."""
        module = self.lightning_module
        own = module.state_dict(keep_vars=True)
        state = {k: shard_like(v, own[k]) if k in own else v for k, v in checkpoint["state_dict"].items()}
        module.load_state_dict(state, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, object]) -> None:
        """Load optimizer states that are full or sharded."""
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            restore_state(optimizer, saved)
