"""What autograd keeps for the backward pass, asked of autograd itself on tensors without memory."""

from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


def saved_tensor_bytes(model: nn.Module, run: Callable[[], object]) -> int:
    """The bytes that `run` leaves alive for its backward pass, weights left out; under FakeTensorMode nothing is computed."""
    weights = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    storages: dict[int, torch.UntypedStorage] = {}  # which keeps them alive: no address is used twice

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        alive = run()
    size = sum(storage.nbytes() for address, storage in storages.items() if address not in weights)
    del alive
    return size


class ResultBytes(TorchDispatchMode):
    """Counts in `n_bytes` what some operations give back while it is on."""

    def __init__(self, operations: Collection[object]) -> None:
        super().__init__()
        self.operations, self.n_bytes = set(operations), 0

    def __torch_dispatch__(self, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        result = func(*args, **(kwargs or {}))
        if func in self.operations:
            results = result if isinstance(result, tuple) else (result,)
            self.n_bytes += sum(x.nbytes for x in results if isinstance(x, Tensor))
        return result
