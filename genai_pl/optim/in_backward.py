"""Optimizer steps inside the backward pass: no two gradients need to exist at once."""

import torch
from torch import Tensor
from torch.optim import Optimizer


class StepInBackward:
    """Steps each parameter of an optimizer as soon as its gradient is complete, and frees the gradient (Lv et al. 2024).

    The optimizer stays one object with its state, groups and schedule: where only one parameter has a gradient, `step`
    updates that one alone. Gradient clipping and accumulation need all gradients together and are impossible here;
    norms are measured on the way and returned by `norms`.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self._measured: list[list[Tensor]] = [[] for _ in optimizer.param_groups]
        for n, group in enumerate(optimizer.param_groups):
            for parameter in group["params"]:
                parameter.register_post_accumulate_grad_hook(lambda p, n=n: self._step(p, n))

    def _step(self, parameter: Tensor, n: int) -> None:
        """Measure, step and free one gradient: the only one that exists."""
        self._measured[n].append(torch.linalg.vector_norm(parameter.grad, dtype=torch.float32))
        self.optimizer.step()
        parameter.grad = None

    def norms(self) -> list[Tensor]:
        """The gradient norm of each group since the last call."""
        group_norms = [torch.stack(norms).norm() if norms else torch.zeros(()) for norms in self._measured]
        self._measured = [[] for _ in self._measured]
        return group_norms
