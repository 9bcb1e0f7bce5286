"""Activation memory: bytes that autograd saves for the backward pass, counted on fake tensors.

Formulas for activations become wrong with every change of a layer; a hook on saved tensors does not.
"""

from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


def saved_tensor_bytes(model: nn.Module, run: Callable[[], object]) -> int:
    """Bytes that `run` leaves alive for its backward pass, the model's weights and buffers left out.

    Views of one storage count once. Under FakeTensorMode nothing is computed or allocated.
    """
    weights = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    storages: dict[int, torch.UntypedStorage] = {}  # holding them keeps addresses unique

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
    """A dispatch mode that counts the bytes of the results of some operations while it is active.

    operations: overloads such as torch.ops.aten.mm.default
    n_bytes: of their results so far
    """

    def __init__(self, operations: Collection[object]) -> None:
        super().__init__()
        self.operations, self.n_bytes = set(operations), 0

    def __torch_dispatch__(self, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        result = func(*args, **(kwargs or {}))
        if func in self.operations:
            results = result if isinstance(result, tuple) else (result,)
            self.n_bytes += sum(x.nbytes for x in results if isinstance(x, Tensor))
        return result
