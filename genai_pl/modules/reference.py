"""Reference policies: the model as it was before training, for preference objectives and RL.

A model with adapters is its own reference with the adapters off, at no memory. Any other needs a frozen copy, which is
kept out of
the module tree: it must be neither trained nor written to checkpoints. A resumed run makes it again from the initial
    weights.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from genai_pl.distributed.dtensor import move_unsharded
from genai_pl.generation.decode import evaluating
from genai_pl.peft.adapter import adapters_disabled, adapters_of


class Reference:
    """The policy without its adapters, or a frozen copy of its current weights where it has none.

    copy: the frozen copy, None where adapters are switched off instead
    """

    def __init__(self, policy: nn.Module) -> None:
        self.copy = None if adapters_of(policy) else copy.deepcopy(policy).requires_grad_(False).eval()

    def to(self, device: torch.device) -> None:
        """Move the copy to a device, except shards, which stay where the strategy put them."""
        if self.copy is not None:
            move_unsharded(self.copy, device)

    @contextmanager
    def of(self, policy: nn.Module) -> Iterator[nn.Module]:
        """A context that yields the reference, in evaluation mode and without gradients."""
        with torch.no_grad():
            if self.copy is not None:
                yield self.copy
            else:
                with adapters_disabled(policy), evaluating(policy):
                    yield policy
