"""Checks of a strategy for a run that is only planned: what a run refuses before it starts processes, an estimate refuses too."""

import torch
from omegaconf import DictConfig
from torch import nn

from genai_pl.cli.planned_run import devices_per_node
from genai_pl.errors import ConfigError
from genai_pl.models import Model
from genai_pl.modules import BaseModule
from genai_pl.modules.policy_gradient import PolicyGradientModule
from genai_pl.strategies import ShardedStrategy
from genai_pl.strategies.deepspeed import (
    ELEMENTWISE,
    OPTION,
    check_codes,
    check_objective,
    check_precision,
    check_stage,
)
from genai_pl.training.pipeline_rules import check_schedule
from genai_pl.training.targets import instantiate


class PlannedPrecision:
    """The precision of the run, as a strategy asks for it; precision: its name in Lightning."""

    def __init__(self, precision: str) -> None:
        self.precision = precision


def check_planned_strategy(config: DictConfig, objective: type[BaseModule], model: Model, *, rows: int) -> None:
    """ConfigError for sizes, objectives, models and options that the strategy refuses in a run.

    model: whole, on fake tensors
    rows: of a batch on one device
    """
    check_schedule(config)
    kind = config.strategy.get("_target_", "").rpartition(".")[2]
    module = planned_module(objective, model)
    if kind == "deepspeed":
        _check_zero(config, module)
    elif kind:
        strategy = instantiate(config.strategy)
        if isinstance(strategy, ShardedStrategy):
            strategy.parallel_devices = [torch.device("cpu")] * devices_per_node(config)
            strategy._num_nodes = config.trainer.num_nodes
            strategy.precision_plugin = PlannedPrecision(config.precision.lightning)
            strategy.check(module, rows=rows)
    _check_in_backward(config)


def kept_in_ram(config: DictConfig) -> tuple[str, ...]:
    """Parts of a device's memory that lie in RAM: a GPU has them only while it computes with them.

    FSDP2 steps shards there. ZeRO-Offload also moves gradients with the optimizer's states (Ren et al. 2021, section 4.1).
    """
    strategy = config.strategy
    if config.plan.gpu == "cpu":
        return ()
    if strategy.get("cpu_offload"):
        return ("weights", "gradients", "optimizer")
    weights = ("weights",) if strategy.get("offload_parameters") else ()
    return (*weights, *(("gradients", "optimizer") if strategy.get("offload_optimizer") else ()))


def planned_module(objective: type[BaseModule], model: Model) -> BaseModule:
    """An objective with its model, and without what only data and weights give it: enough for the checks of a strategy."""
    module = objective.__new__(objective)
    nn.Module.__init__(module)
    module.model, module.reference = model, None
    return module


def _check_zero(config: DictConfig, module: BaseModule) -> None:
    """ConfigError for what `ZeroStrategy` refuses; its package need not be here."""
    check_stage(config.strategy.stage, offload_parameters=config.strategy.offload_parameters)
    check_codes(module.model, config.strategy.stage == 3)
    check_objective(writes=isinstance(module, PolicyGradientModule))
    optimizer, names = config.optimizer._target_.rpartition(".")[2], [kind.__name__.lower() for kind in ELEMENTWISE]
    if optimizer not in names or config.optimizer.get("moments") not in (None, "fp32"):
        raise ConfigError(f"{OPTION} steps vectors of weights, with moments as wide: optimizer={', '.join(names)}")
    check_precision(config.precision.lightning)


def _check_in_backward(config: DictConfig) -> None:
    """ConfigError where gradients are freed one by one, and several devices need those of each other."""
    n = devices_per_node(config) * config.trainer.num_nodes
    if config.trainer.optimizer_in_backward and (n > 1 or "_target_" in config.strategy):
        raise ConfigError(
            "trainer.optimizer_in_backward=true is for one process: with several, strategy=fsdp divides gradients"
        )
