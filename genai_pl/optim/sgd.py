"""Stochastic gradient descent."""

import torch
from torch import Tensor
from torch.optim.sgd import sgd as torch_sgd

from genai_pl.distributed.dtensor import local_shard
from genai_pl.errors import ConfigError
from genai_pl.optim.checks import check
from genai_pl.optim.groups import Group, NamedParameters, decay_groups
from genai_pl.optim.moments import NarrowOptimizer, narrow_kind, narrowed, steps_taken, wide, widened


def sgd(
    named_parameters: NamedParameters,
    *,
    lr: float,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
    moments: str | None = None,
) -> torch.optim.SGD:
    """SGD with L2 decay: without momentum, theta - lr * (grad + weight_decay * theta).

    moments: fp32, bf16 or int8, in which the momentum is kept; None: the dtype of the weights
    """
    check("optimizer", lr=lr, momentum=momentum, weight_decay=weight_decay)
    if nesterov and momentum == 0.0:
        raise ConfigError("optimizer.nesterov=true needs optimizer.momentum above 0")
    groups = decay_groups(named_parameters, weight_decay)
    kind, options = narrow_kind(moments, groups), {"lr": lr, "momentum": momentum, "nesterov": nesterov}
    if moments is not None and momentum == 0.0:
        raise ConfigError(f"optimizer.moments={moments}: there are none without momentum; set optimizer.momentum")
    if kind is not None:
        return NarrowSGD(groups, kind=kind, **options)
    optimizer = torch.optim.SGD(groups, **options)
    optimizer.register_load_state_dict_pre_hook(lambda _, state: widened(state))  # of a run with momentum in 8 bits
    return optimizer


class NarrowSGD(NarrowOptimizer, torch.optim.SGD):
    """SGD with momentum as `kind` says."""

    def step_one(self, parameter: Tensor, group: Group) -> None:
        """Widen, step and narrow the momentum of one parameter."""
        own, state = local_shard(parameter), self.state[parameter]
        name, count = "momentum_buffer", steps_taken(state, parameter) + 1
        buffers = [wide(state, name) if name in state else None]  # torch begins with the first gradient
        weight, gradient = own.float(), local_shard(parameter.grad).float()
        torch_sgd(
            [weight], [gradient], buffers, foreach=False, fused=False, weight_decay=group["weight_decay"],
            momentum=group["momentum"], lr=group["lr"], dampening=group["dampening"], nesterov=group["nesterov"],
            maximize=False,
        )  # fmt: skip
        own.copy_(weight)
        state["step"] = count
        state |= narrowed(name, buffers[0], parameter, count, self.kind)
