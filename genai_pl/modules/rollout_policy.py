"""Policies of rollouts: the model that is trained, laid out for decoding while its weights stay what they are.

A rollout reads every weight once for each token of its rows, thousands of times between two steps of the optimizer. So it
pays to add the adapters to the weights and to lay these out for the compiled decoding step, once for each rollout. What is
sampled are draws from the same distribution up to rounding in float32; how likely the draws were is measured afterwards
by a pass like those of training.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from genai_pl.kernels.packed_product import products_of
from genai_pl.kernels.row_products import is_built
from genai_pl.models import prepare_for_decoding
from genai_pl.models.fused_decode import supports_fused_decode
from genai_pl.peft.adapter import AdapterLayer
from genai_pl.peft.adapter_layers import WeightAdapter
from genai_pl.peft.merge import merged_copy
from genai_pl.peft.targets import base_module

WORTH = 16  # tokens of a completion: the copy takes the time that some eight steps of sixteen rows save


@contextmanager
def rollout_policy(model: nn.Module, n_tokens: int) -> Iterator[nn.Module]:
    """A context that yields what to sample from: a copy for decoding where there can be one, or the model itself.

    n_tokens: of the longest completion, all its turns together. The copy is in evaluation mode and shares what memory it can;
    it must not be used after the context. Always the same product, since a probe could choose another one after a resume,
    which would sample other tokens.
    """
    if n_tokens < WORTH or not _is_mergeable(model):
        yield model
        return
    policy = merged_copy(model).eval()
    try:
        prepare_for_decoding(policy, product=products_of(torch.float32)[0])
        yield policy
    finally:
        vars(policy).clear()  # its parts refer to each other: else their memory would wait for the garbage collector


def _is_mergeable(model: nn.Module) -> bool:
    """True for a decoder that the compiled step knows, in float32 on a CPU, whose adapters are changes of its weights.

    Not under autocast: merged weights in 16 bits would lose most of an adapter's effect, which is small at first.
    """
    adapters = [module for module in model.modules() if isinstance(module, AdapterLayer)]
    return (
        not torch.is_autocast_enabled("cpu")
        and all(isinstance(layer, WeightAdapter) for layer in adapters)
        and all(_is_plain(tensor) for tensor in model.parameters())
        and supports_fused_decode(model, inner=base_module)
        and is_built()
    )


def _is_plain(parameter: Tensor) -> bool:
    """True for float32 in the memory of this process: neither a shard nor codes."""
    return type(parameter.data) is Tensor and parameter.dtype is torch.float32 and parameter.device.type == "cpu"
