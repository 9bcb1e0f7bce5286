"""What a model takes on one device, counted on tensors without memory."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from genai_pl.errors import ConfigError
from genai_pl.models import Model, ModelConfig, flops_per_token, n_parameters
from genai_pl.models.saved import ResultBytes, saved_bytes
from genai_pl.names import Shape
from genai_pl.optim.muon import is_hidden_matrix
from genai_pl.planning import Layout
from genai_pl.strategies import kept_operations, recompute

# numbers of state per weight; Adafactor keeps a row and a column
MOMENTS = {"adamw": 2.0, "adam": 2.0, "sgd": 1.0, "adafactor": 0.01}


@contextmanager
def weightless(dtype: torch.dtype) -> Iterator[None]:
    """Inside, tensors have shapes and dtypes and no memory; new weights are of the dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with FakeTensorMode():
            yield
    finally:
        torch.set_default_dtype(before)


def part_of(config: ModelConfig, layout: Layout) -> ModelConfig:
    """The model that one device holds: some of the heads and channels, or of the layers; embeddings and head whole."""
    for name, parts in (("n_head", layout.tensor), ("n_kv_head", layout.tensor), ("intermediate_size", layout.tensor)):
        if getattr(config, name) % parts:
            raise ConfigError(f"model.{name} ({getattr(config, name)}) must be divisible by {parts}: see strategy")
    return replace(
        config,
        n_head=config.n_head // layout.tensor,
        n_kv_head=config.n_kv_head // layout.tensor,
        intermediate_size=config.intermediate_size // layout.tensor,
        n_layer=-(-config.n_layer // layout.stages),
    )


def activation_bytes(
    model: Model, *, rows: int, seq_len: int, product: torch.dtype | None, every: int | None, kind: str, fused: bool
) -> float:
    """Bytes that a batch leaves for the backward pass of the layers; where blocks run again, what one of them adds then.

    `fused` attention keeps no scores of dropout, as our kernels for GPUs do.
    """
    for module in model.modules():
        if fused and "attend" in vars(module):
            module.dropout = 0.0
    ids = torch.zeros(rows, seq_len, dtype=torch.long)
    target = {"decoder_input_ids": ids} if model.config.shape is Shape.encoder_decoder else {}

    def run() -> torch.Tensor:
        with torch.autocast("cpu", product) if product else nullcontext():
            return model.features(ids, **target)

    everything = saved_bytes(model, run)
    if every is None:
        return everything
    with ResultBytes(kept_operations()) as products:
        run()
    recompute(model, every)  # `full` also to count `selective`: what that keeps is no tensor saved by autograd
    inputs = saved_bytes(model, run)
    n = max(1, n_again(model, every))
    kept = products.n_bytes * n / len(model.blocks) if kind == "selective" else 0
    return inputs + kept + (everything - inputs - kept) / n


def n_again(model: Model, every: int) -> int:
    """How many blocks run again in the backward pass."""
    return len(model.blocks) // every


def largest_part(model: Model) -> int:
    """Numbers of the largest part that FSDP gathers together: a block, or all that is outside of blocks."""
    blocks = list(dict.fromkeys(model.blocks))
    sizes = [n_parameters(block) for block in blocks]
    return max(*sizes, n_parameters(model) - sum(sizes))


def largest_gradient(model: Model) -> int:
    """Numbers of the largest trained weight."""
    return max(p.numel() for p in model.parameters() if p.requires_grad)


def moments(optimizer: str, model: Model) -> float:
    """Numbers of optimizer state per trained weight."""
    if optimizer != "muon":
        return MOMENTS.get(optimizer, 2.0)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = sum(p.numel() for name, p in trained if is_hidden_matrix(name, p))
    return 2.0 - matrices / sum(p.numel() for _, p in trained)


def training_flops(model: Model, config: ModelConfig, seq_len: int, *, again: float) -> float:
    """FLOPs of a token: 6 N and attention, 2 less for each frozen weight, and the share `again` of the forward pass more."""
    flops = flops_per_token(model, config, seq_len)
    frozen = sum(p.numel() for block in model.blocks for p in block.parameters() if p.ndim >= 2 and not p.requires_grad)
    return flops * (1 + again / 3) - 2.0 * frozen
