"""DeepSpeed: ZeRO through Lightning's strategy, with the clipping, accumulation and checkpoints of the other strategies.

Lightning's strategy leaves these to DeepSpeed's engine: it steps at every batch, and writes folders that nothing else reads.
Here the engine is told which batch ends a step, its gradient norm goes to the logs, and a checkpoint is one file with weights
and moments in full, as DDP writes it: a run can go on with any strategy. It also runs on CPU processes, through gloo.
"""

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from pathlib import Path

import torch
from lightning import LightningModule
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, Strategy
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from genai_pl.errors import ConfigError
from genai_pl.peft.quantize import QuantizedLinear

OPTION = "strategy=deepspeed"
ELEMENTWISE = (Adam, AdamW, SGD)  # optimizers that may see all weights of a rank as one vector


class ZeroStrategy(DeepSpeedStrategy):
    """Lightning's DeepSpeed strategy behind the same module, checkpoints and exports as the others.

    options: of Lightning's strategy
    """

    def __init__(self, **options: object) -> None:
        super().__init__(**options)
        self.config["zero_force_ds_cpu_optimizer"] = False  # torch's optimizers may step what is kept in RAM
        self._groups: list[list[nn.Parameter]] = []  # of the optimizer, before they become one vector each

    # what the run may be

    @property
    def gathers(self) -> bool:
        """Whether a process can run the whole model alone: not where parameters are sharded."""
        return not self.zero_stage_3

    def check(self, module: LightningModule, *, rows: int) -> None:
        """ConfigError for a run that DeepSpeed cannot make."""
        check_objective(writes=not module.automatic_optimization)
        check_precision(self.precision_plugin.precision)
        check_codes(module.model, self.zero_stage_3)
        module.strategy_clips = True

    def setup_environment(self) -> None:
        """Start the processes; Lightning's own refuses CPUs."""
        import deepspeed

        device = self.root_device.type
        if deepspeed.get_accelerator().device_name() != device:
            raise ConfigError(f"{OPTION}: DeepSpeed has chosen another device than {device}; DS_ACCELERATOR={device}")
        # past Lightning's check
        if isinstance(self.accelerator, CPUAccelerator):
            DDPStrategy.setup_environment(self)
        else:
            super().setup_environment()

    def setup_distributed(self) -> None:
        """Connect the processes; Lightning's own takes numbered devices only."""
        if isinstance(self.accelerator, CPUAccelerator):
            reset_seed()
            self.set_world_ranks()
            self._init_deepspeed_distributed()
        else:
            super().setup_distributed()

    @property
    def root_device(self) -> torch.device:
        """The device of this process, which DeepSpeed wants numbered."""
        device = super().root_device
        return torch.device("cpu", self.local_rank) if device.type == "cpu" else device

    def _init_optimizers(self) -> tuple[Optimizer, LRSchedulerConfig | None]:
        optimizer, schedule = super()._init_optimizers()
        if type(optimizer) not in ELEMENTWISE:
            name = type(optimizer).__name__
            raise ConfigError(
                f"{OPTION}: {name} needs whole matrices or moments of its own; optimizer=adamw, adam, sgd"
            )
        self._groups = [list(group["params"]) for group in optimizer.param_groups]
        return optimizer, schedule

    # steps

    @property
    def handles_gradient_accumulation(self) -> bool:
        """False: Lightning counts the batches of a step, and tells the engine in `backward`."""
        return False

    def block_backward_sync(self) -> AbstractContextManager[None]:
        """Nothing to block: the engine knows which batch ends a step."""
        return nullcontext()

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: object, **kwargs: object) -> Tensor:
        """Add a batch to the gradients; the loss is scaled by the module already."""
        engine, accumulates = self.deepspeed_engine, self.lightning_module.trainer.fit_loop._should_accumulate()
        engine.set_gradient_accumulation_boundary(is_boundary=not accumulates)
        loss = super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)
        if accumulates:
            engine.step()  # counts the batch
        return loss

    def optimizer_step(
        self, optimizer: Optimizer, closure: Callable[[], object], model: nn.Module | None = None, **kwargs: object
    ) -> object:
        """Step, in which the engine clips, and give the module the norm of the gradients before it."""
        result = super().optimizer_step(optimizer, closure, model, **kwargs)
        norm = torch.as_tensor(self.deepspeed_engine.get_global_grad_norm(), dtype=torch.float32)
        self.lightning_module.finish_step([norm], optimizer)
        return result

    # checkpoints

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """False: the engine divides weights that are restored already."""
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        """True: Lightning calls `load_optimizer_state_dict`."""
        return True

    def save_checkpoint(self, checkpoint: dict, filepath: str | Path, storage_options: object = None) -> None:
        """Write one file from the first rank."""
        Strategy.save_checkpoint(self, checkpoint, filepath)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, object]:
        """The contents of a file."""
        if Path(checkpoint_path).is_dir():
            raise ConfigError(f"{OPTION}: {checkpoint_path} is a sharded checkpoint; resume it with strategy=fsdp")
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, object], strict: bool = True) -> None:
        """Load weights, before the engine divides them."""
        self.lightning_module.load_state_dict(checkpoint["state_dict"], strict=strict)

    @torch.no_grad()
    def lightning_module_state_dict(self) -> dict[str, Tensor]:
        """Weights in full, in the optimizer's precision, on the first rank; {} on others. A collective."""
        state = self.lightning_module.state_dict(keep_vars=True)
        copies = {value: self._full(value) for value in dict.fromkeys(state.values())}
        return {name: copies[value] for name, value in state.items()} if self.is_global_zero else {}

    @torch.no_grad()
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, object]:
        """The optimizer's state in full, as torch has it for undivided weights; a collective."""
        from deepspeed.utils import safe_get_full_optimizer_state

        self._link_moments()
        # names of the moments, and the number of steps, which all groups share
        first = next(iter(self._torch_optimizer.state.values()), {})
        state: dict[int, dict[str, object]] = {}
        for number, parameter in self._numbered():
            values = {
                name: safe_get_full_optimizer_state(parameter, name).cpu() if name != "step" else value.clone().cpu()
                for name, value in first.items()
                if isinstance(value, Tensor)
            }
            if values and self.is_global_zero:
                state[number] = values
        return {"state": state, "param_groups": [group | {"params": n} for group, n in self._numbered_groups()]}

    @torch.no_grad()
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, object]) -> None:
        """Divide the moments among the ranks, and the weights once more: those of the engine may be rounded."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        weights, own = checkpoint["state_dict"], self.lightning_module.named_parameters(remove_duplicate=False)
        for name, parameter in own:
            if parameter.requires_grad:
                safe_set_full_fp32_param(parameter, weights[name].to(self.root_device, torch.float32))
        (saved,) = checkpoint["optimizer_states"]
        for (group, _), stored in zip(self._numbered_groups(), saved["param_groups"], strict=True):
            group |= {k: v for k, v in stored.items() if k not in ("params", "fused", "foreach")}
        # numbers of parameters go group by group, here as in the saved state
        numbers = [n for group in saved["param_groups"] for n in group["params"]]
        self._create_moments(next(iter(saved["state"].values()), {}))
        for number, (_, parameter) in zip(numbers, self._numbered(), strict=True):
            for name, value in saved["state"].get(number, {}).items():
                if isinstance(value, Tensor) and name != "step":
                    safe_set_full_optimizer_state(parameter, value.to(self.root_device, torch.float32), name)

    @torch.no_grad()
    def gather(self) -> None:
        """Give the first rank all weights in full, in place and in RAM, for the export; a collective."""
        for parameter in self.lightning_module.parameters():
            full = self._full(parameter)
            if full is not None:
                parameter.data = full

    # what the engine holds

    @property
    def _torch_optimizer(self) -> Optimizer:
        """The optimizer that steps this rank's part of each group, a vector."""
        return self.deepspeed_engine.optimizer.optimizer

    def _numbered(self) -> Iterator[tuple[int, nn.Parameter]]:
        """Parameters by their numbers in the state of an optimizer."""
        return enumerate(parameter for group in self._groups for parameter in group)

    def _numbered_groups(self) -> list[tuple[dict[str, object], list[int]]]:
        """The options of each group, which the optimizer reads, and the numbers of its parameters."""
        numbers = iter(range(sum(map(len, self._groups))))
        groups = self._torch_optimizer.param_groups
        return [(group, [next(numbers) for _ in own]) for group, own in zip(groups, self._groups, strict=True)]

    def _full(self, value: Tensor) -> Tensor | None:
        """A weight or buffer in full, in RAM, on the first rank; None on others. A collective."""
        from deepspeed import zero
        from deepspeed.utils import safe_get_full_fp32_param

        full = safe_get_full_fp32_param(value) if value.requires_grad else None
        if full is not None:
            return full.detach().cpu() if self.is_global_zero else None
        # a buffer, or a frozen weight
        with zero.GatheredParameters([value]) if hasattr(value, "ds_id") else nullcontext():
            return value.detach().to("cpu", copy=True) if self.is_global_zero else None

    def _create_moments(self, like: Mapping[str, object]) -> None:
        """Moments of zero, as the first step would create them, and the number of steps, of a saved state."""
        engine, inner = self.deepspeed_engine.optimizer, self._torch_optimizer
        parts = engine.fp32_partitioned_groups_flat if self.zero_stage_3 else engine.single_partition_of_fp32_groups
        for part in parts:
            for name, value in like.items():
                if isinstance(value, Tensor):
                    inner.state[part][name] = value.clone() if name == "step" else torch.zeros_like(part)
        self._link_moments()

    def _link_moments(self) -> None:
        """Let each weight find its part of the moments.

        The engine of stages 1 and 2 does so once, after the first group is stepped, when others have none yet (`findings/`).
        """
        engine = self.deepspeed_engine.optimizer
        if not self.zero_stage_3 and self._torch_optimizer.state:
            engine._hp_optimizer_states_linked = False
            engine._lazy_init_hp_params_optimizer_state()


def check_codes(model: nn.Module, divides_weights: bool) -> None:
    """ConfigError for a quantized base whose codes the engine would take for a weight, and cut as one flat vector."""
    if divides_weights and any(isinstance(layer, QuantizedLinear) for layer in model.modules()):
        raise ConfigError(f"peft.quantize: {OPTION} divides no codes: strategy.stage=2, or strategy=fsdp, which does")


def check_objective(*, writes: bool) -> None:
    """ConfigError for an objective that writes while it trains: its steps are its own."""
    if writes:
        raise ConfigError(f"{OPTION}: an objective that writes while it trains steps by itself; strategy=fsdp")


def check_precision(precision: str) -> None:
    """ConfigError for fp16. precision: its name in Lightning."""
    if precision.startswith("16"):
        raise ConfigError(f"{OPTION}: precision=fp16 is not supported; precision=bf16")


def check_stage(stage: int, *, offload_parameters: bool) -> None:
    """ConfigError for a stage that ZeRO has not, or one without the parts that are to be kept in RAM."""
    if stage not in (1, 2, 3):
        raise ConfigError(f"strategy.stage={stage}: ZeRO has stages 1, 2 and 3")
    if offload_parameters and stage != 3:
        raise ConfigError(
            f"strategy.offload_parameters=true needs strategy.stage=3, not {stage}, where all have all weights"
        )


def deepspeed(*, stage: int, offload_optimizer: bool, offload_parameters: bool) -> Strategy:
    """The DeepSpeed strategy; ConfigError where the package is not installed.

    stage: of ZeRO, 1 to 3
    offload_optimizer, offload_parameters: keep them in RAM
    """
    if find_spec("deepspeed") is None:
        raise ConfigError(f"{OPTION}: the package is not installed; pip install deepspeed, or strategy=fsdp")
    check_stage(stage, offload_parameters=offload_parameters)
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # what it finds by itself, with a warning
    warnings.filterwarnings("ignore", "Since DeepSpeed handles gradient clipping", UserWarning)  # so does ours
    warnings.filterwarnings("ignore", "`torch.distributed.* is deprecated", FutureWarning)  # which DeepSpeed calls
    return ZeroStrategy(stage=stage, offload_optimizer=offload_optimizer, offload_parameters=offload_parameters)
