"""The model as it was before training, which a policy is measured against."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from genai_pl.distributed.dtensor import move_unsharded
from genai_pl.generation.decode import evaluating
from genai_pl.peft.adapter import adapters_disabled, adapters_of


class Reference:
    """The policy without its adapters, or a frozen copy where it has none; no part of any module or checkpoint."""

    def __init__(self, policy: nn.Module) -> None:
        self.copy = None if adapters_of(policy) else copy.deepcopy(policy).requires_grad_(False).eval()

    def to(self, device: torch.device) -> None:
        """Move the copy, if there is one."""
        if self.copy is not None:
            move_unsharded(self.copy, device)

    @contextmanager
    def of(self, policy: nn.Module) -> Iterator[nn.Module]:
        """The reference inside, in evaluation mode and without gradients."""
        with torch.no_grad():
            if self.copy is not None:
                yield self.copy
            else:
                with adapters_disabled(policy), evaluating(policy):
                    yield policy
