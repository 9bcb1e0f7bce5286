"""Routing in training: auxiliary losses, loads and balance biases of a model's mixture layers, exact over an optimizer step.

Each auxiliary loss is a mean over the tokens of one pass of one micro-batch (the balance loss is a product of two such
means, so it is no sum over tokens), summed over layers as in Fedus et al. 2021. A micro-batch's value counts by its targets,
as its loss does: over ranks and accumulated batches the step's auxiliary loss is sum(targets * value) / sum(targets).
Routers that are frozen, under an adapter for example, get neither losses nor biases.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from genai_pl.models.experts import LayerRouting, MoE, collecting

Reduce = Callable[[Tensor], Tensor]
NAMES = ("balance_loss", "router_z_loss")


class Routing:
    """The mixture layers of a model in training, and their sums over the current optimizer step and the last complete one.

    model: its configuration holds the coefficients balance_loss, router_z_loss and balance_bias; a model without mixture
    layers makes every method do nothing.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers = [module for module in model.modules() if isinstance(module, MoE)]
        options = model.config if self.layers else None
        self.coefficients = {name: getattr(options, name) for name in NAMES} if options else {}
        self.bias_step = options.balance_bias if options else 0.0
        self.window: dict[str, Tensor] = {}  # sums of the current accumulation window
        self.finished: dict[str, Tensor] = {}  # of the last complete step
        self._found: list[LayerRouting] = []

    @contextmanager
    def collected(self) -> Iterator[None]:
        """A context around the forward passes of one micro-batch, whose routing `loss` then takes."""
        if not self.layers:
            yield
            return
        with collecting() as self._found:
            yield

    def loss(self, targets: Tensor) -> Tensor | float:
        """The auxiliary loss of the collected passes times `targets`, the number of the micro-batch's targets: a sum.

        With several passes, of a pair's two texts for example, their mean counts. Also adds to the sums for the logs.
        """
        found, self._found = self._found, []
        if not found:
            return 0.0
        numbers = {id(layer): n for n, layer in enumerate(self.layers)}
        passes = len(found) / len({id(routing.layer) for routing in found})
        sums = {name: torch.stack([getattr(r, name) for r in found]).sum() / passes for name in NAMES}
        load = found[0].load.new_zeros(len(self.layers), len(found[0].load))
        for routing in found:
            load[numbers[id(routing.layer)]] += routing.load
        # sums for the logs: the mean over layers
        logged = {name: value.detach() * targets / len(self.layers) for name, value in sums.items()}
        for name, value in {**logged, "load": load, "targets": torch.as_tensor(targets)}.items():
            self.window[name] = self.window.get(name, 0) + value
        if not found[0].layer.router.weight.requires_grad:
            return 0.0
        return targets * sum(self.coefficients[name] * value for name, value in sums.items())

    def finish_step(self, over_ranks: Reduce) -> None:
        """End the accumulation window, and move the biases by the loads of the whole step over all ranks."""
        if not self.window:
            return
        self.finished, self.window = self.window, {}
        if self.bias_step and self.layers[0].router.weight.requires_grad:
            load = over_ranks(self.finished["load"])
            # up where an expert has less than its share, down where it has more (arXiv 2412.19437, 2.1.2; 2408.15664)
            moves = self.bias_step * (load.mean(1, keepdim=True) - load).sign()
            for layer, move in zip(self.layers, moves, strict=True):
                layer.balance_bias.add_(move.to(layer.balance_bias.dtype))

    def drop_step(self) -> None:
        """Forget the current accumulation window, whose gradients are dropped."""
        self.window = {}

    def metrics(self, over_ranks: Reduce) -> dict[str, float]:
        """Auxiliary losses, means over layers (an even load has balance_loss 1), and expert_load of the last step: max / mean
        over experts, of each layer and as a mean over layers. Every rank must call it.
        """
        if not self.finished:
            return {}
        sums = {name: over_ranks(value) for name, value in self.finished.items()}
        values = {f"train/{name}": (sums[name] / sums["targets"].clamp(min=1)).item() for name in NAMES}
        loads = (sums["load"].amax(1) / sums["load"].mean(1).clamp(min=1e-9)).tolist()
        layers = {f"train/expert_load/layer_{n}": load for n, load in enumerate(loads)} if len(loads) > 1 else {}
        return {**values, "train/expert_load": sum(loads) / len(loads), **layers}
