"""Adam and AdamW whose moments are kept in another number of bits than the weights."""

import torch
from torch import Tensor
from torch.optim.adam import adam as torch_adam

from genai_pl.distributed.dtensor import local_shard
from genai_pl.optim.groups import Group
from genai_pl.optim.moments import NarrowOptimizer, narrowed, steps_taken, wide_moments


class NarrowAdam(NarrowOptimizer, torch.optim.Adam):
    """Adam with moments as `kind` says; `decoupled_weight_decay` makes it AdamW."""

    def step_one(self, parameter: Tensor, group: Group) -> None:
        """Widen, step and narrow both moments of one parameter."""
        own, state = local_shard(parameter), self.state[parameter]
        count, moments = steps_taken(state, parameter), wide_moments(state, parameter, "exp_avg", "exp_avg_sq")
        weight, gradient = own.float(), local_shard(parameter.grad).float()
        torch_adam(
            [weight], [gradient], [moments[0]], [moments[1]], [], [count],
            foreach=False, fused=bool(group["fused"]), amsgrad=False, maximize=False,
            beta1=group["betas"][0], beta2=group["betas"][1], lr=group["lr"], eps=group["eps"],
            weight_decay=group["weight_decay"], decoupled_weight_decay=group["decoupled_weight_decay"],
        )  # fmt: skip
        own.copy_(weight)  # itself where the weight is in float32
        state["step"] = count
        for name, moment in zip(("exp_avg", "exp_avg_sq"), moments, strict=True):
            state |= narrowed(name, moment, parameter, count, self.kind)
