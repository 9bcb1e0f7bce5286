"""Measurements of a model for one device: parameters, activations and FLOPs, counted on fake tensors.

A model of any size can be measured on any machine: `fake_tensors` gives weights without memory. The strategy's own
rules decide what a device holds, such as the stages of a pipeline.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from genai_pl.config.enums import AttentionKind, Shape
from genai_pl.distributed.context_group import ContextGroup
from genai_pl.errors import ConfigError
from genai_pl.kernels import AttentionMask, ScoreOptions
from genai_pl.kernels.attention import fused_only
from genai_pl.kernels.mask import EVERYTHING
from genai_pl.models import Model, ModelConfig, flops_per_token, n_parameters
from genai_pl.models.attention import Attention
from genai_pl.models.experts import Experts
from genai_pl.models.flops import multiplied
from genai_pl.models.transformer import Transformer
from genai_pl.optim.moments import moment_bytes
from genai_pl.optim.muon import is_hidden_matrix
from genai_pl.peft.quantize import Quantized, QuantizedLinear
from genai_pl.planning.activation_memory import ResultBytes, saved_tensor_bytes
from genai_pl.planning.cost_model import Layout
from genai_pl.strategies import kept_operations, recompute
from genai_pl.strategies.context_parallel import split_sequences
from genai_pl.strategies.pipeline_stages import parameter_stages

# numbers of optimizer state per weight; Adafactor keeps a row and a column
MOMENTS = {"adamw": 2.0, "adam": 2.0, "sgd": 1.0, "adafactor": 0.01}


class _Mode(FakeTensorMode):
    """The fake tensor mode of a context; copies of tensors share it, where deepcopy would give each copy its own."""

    def __deepcopy__(self, memo: dict) -> "_Mode":
        return self


@contextmanager
def fake_tensors(dtype: torch.dtype) -> Iterator[None]:
    """A context in which tensors have shape and dtype and no memory; new weights are of the dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with _Mode(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*data pointer of FakeTensor")  # deepcopy asks for it without need
            yield
    finally:
        torch.set_default_dtype(before)


def local_model_config(config: ModelConfig, layout: Layout) -> ModelConfig:
    """The configuration of the part of a model that one device holds under tensor and pipeline parallelism.

    Fewer heads, channels and words, or fewer layers. ConfigError where heads or channels cannot be divided.
    """
    if config.n_experts and layout.tensor * layout.stages > 1:
        raise ConfigError("model.n_experts is divided by strategy=fsdp only: set trainer=fsdp, or strategy=fsdp")
    if layout.experts > 1 and (not config.n_experts or config.n_experts % layout.experts):
        raise ConfigError(
            f"model.n_experts ({config.n_experts}) must be divisible by strategy.expert_parallel_size ({layout.experts})"
        )
    for name, parts in (("n_head", layout.tensor), ("n_kv_head", layout.tensor), ("intermediate_size", layout.tensor)):
        if getattr(config, name) % parts:
            raise ConfigError(f"model.{name} ({getattr(config, name)}) must be divisible by {parts}: see strategy")
    return replace(
        config,
        n_head=config.n_head // layout.tensor,
        n_kv_head=config.n_kv_head // layout.tensor,
        intermediate_size=config.intermediate_size // layout.tensor,
        n_layer=-(-config.n_layer // layout.stages),
        vocab_size=-(-config.vocab_size // layout.tensor),
    )


def stage_sizes(model: Model, n_ranks: int, loops: int = 1) -> list[tuple[int, int]]:
    """For each device of a pipeline the parameters of its stages, and how many of them are trained."""
    holders = parameter_stages(model, n_ranks * loops)
    ranks = {parameter: {stage % n_ranks for stage in stages} for parameter, stages in holders.items()}
    stage_parameters = [[parameter for parameter, held in ranks.items() if n in held] for n in range(n_ranks)]
    return [(sum(p.numel() for p in own), sum(p.numel() for p in own if p.requires_grad)) for own in stage_parameters]


class Activations(NamedTuple):
    """Bytes of activations: kept until the backward pass, and beside them those of a block that runs again for it."""

    kept: float
    recomputed: float


def activation_bytes(
    model: Model,
    *,
    rows: int,
    seq_len: int,
    product: torch.dtype | None,
    every: int | None,
    kind: str,
    fused: bool,
    sequence_shards: int = 1,
    context: int = 1,
) -> Activations:
    """Bytes that a batch leaves for the backward pass of the layers.

    With recomputation the peak counts: what is kept of all blocks, and one recomputed block in full. Where rows are divided,
    so do the gradients of one layer's gathered keys and values, twice: as they are made and as they are sent.

    rows, seq_len: of the batch
    product: dtype of autocast, None for none
    every, kind: recomputation of every n-th block, full or selective; every=None: none
    fused: attention saves no scores, for dropout or dense products, as our GPU kernels do not
    sequence_shards: shards of each sequence between the parts of blocks, under sequence parallelism
    context: devices that divide the tokens of each row
    """
    # the layers as the device would run them
    if context > 1:
        _divide_rows(model, context, fused=fused)
    if sequence_shards > 1:
        _shard_sequences(model, seq_len // context, sequence_shards)
    for module in model.modules():
        if fused and isinstance(module, Attention):
            module.dropout = 0.0
    ids = torch.zeros(rows, seq_len, dtype=torch.long)
    target = {"decoder_input_ids": ids} if model.config.shape is Shape.encoder_decoder else {}

    def run() -> torch.Tensor:
        precision = torch.autocast("cpu", product) if product else nullcontext()
        with precision, fused_only() if fused else nullcontext():
            return model.features(ids, **target)

    # without recomputation: all that autograd saves
    config, itemsize = model.config, (product or torch.get_default_dtype()).itemsize
    keys = rows * seq_len * 2 * config.n_kv_head * config.head_dim * itemsize if context > 1 else 0
    everything = saved_tensor_bytes(model, run)
    if every is None:
        return Activations(everything + 2 * keys, 0.0)
    # with it: the inputs of blocks, products if kept, and one block at a time in full
    with ResultBytes(kept_operations()) as products:
        run()
    recompute(model, every)  # `full` also to count `selective`: what that keeps is no tensor saved by autograd
    inputs = saved_tensor_bytes(model, run)
    n = max(1, n_recomputed(model, every))
    products_kept = products.n_bytes * n / len(model.blocks) if kind == "selective" else 0
    kept = inputs + products_kept
    return Activations(kept, (everything - kept) / n + 2 * keys)


def keep_exact(model: Model) -> None:
    """Make float32 again what FSDP does not gather in the dtype of products, in place: all but the matrices of blocks.

    So hidden states between blocks are float32, as those of the embeddings are.
    """
    rounded = {parameter for block in model.blocks for parameter in block.parameters() if parameter.ndim > 1}
    for parameter in model.parameters():
        if parameter not in rounded:
            parameter.data = parameter.data.float()


class _RepeatedKeys(ContextGroup):
    """A group in which a rank takes its own keys for those of all others: their number is all that counts here."""

    def gather_keys(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = torch.stack([k, v]).repeat(1, 1, 1, self.size, 1).unbind(0)
        return keys, values


class _Unmasked(nn.Module):
    """Attention without a mask, which our GPU kernels do not write out.

    attend: the attention function
    """

    def __init__(self, attend: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.attend = attend

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, _: AttentionMask, options: ScoreOptions
    ) -> torch.Tensor:
        return self.attend(q, k, v, EVERYTHING, options)


def _divide_rows(model: Model, n: int, *, fused: bool) -> None:
    """Make a model compute the tokens of one of n devices that divide rows, in place."""
    for layer in model.modules():
        if fused and isinstance(layer, Attention) and model.config.attention_kind is AttentionKind.full:
            layer.attend = _Unmasked(layer.attend)
    split_sequences(model, _RepeatedKeys(size=n))


def _shard_sequences(model: Model, seq_len: int, n_shards: int) -> None:
    """Make a model work on the hidden states that sequence parallelism leaves to one rank, in place."""

    def shard(x: torch.Tensor) -> torch.Tensor:
        return x[:, : -(-seq_len // n_shards)].clone()  # a view would count as the full tensor

    def gather(x: torch.Tensor) -> torch.Tensor:
        return x.repeat(1, n_shards, 1)[:, :seq_len]

    for stack in (module for module in model.modules() if isinstance(module, Transformer)):
        stack.blocks[0].register_forward_pre_hook(lambda _, args: (shard(args[0]), *args[1:]))
        stack.norm.register_forward_hook(lambda _, args, hidden: gather(hidden))
        for block in dict.fromkeys(stack.blocks):
            for part in block.parts:
                part.register_forward_pre_hook(lambda _, args: (gather(args[0]), *args[1:]))
                part.register_forward_hook(lambda _, args, y: shard(y))


def n_recomputed(model: Model, every: int) -> int:
    """Blocks whose forward pass runs again in the backward pass."""
    return len(model.blocks) // every


def largest_part(model: Model, *, experts: int = 1) -> int:
    """Parameters of the largest unit that FSDP gathers: a block, or everything outside of blocks.

    experts: devices that hold the experts between them
    """
    blocks = list(dict.fromkeys(model.blocks))
    sizes = [n_parameters(block) for block in blocks]
    held = [n - expert_parameters(block) * (experts - 1) // experts for n, block in zip(sizes, blocks, strict=True)]
    return max(*held, n_parameters(model) - sum(sizes))


class Codes(NamedTuple):
    """Quantized weights of a model: parameters, those of `largest_part`, bytes of each, parameters of the largest weight."""

    quantized: int = 0
    largest_quantized: int = 0
    code_bytes: float = 0.0
    largest_matrix: int = 0


def quantized_weights(model: Model) -> Codes:
    """The numbers of a model's weights that are held as codes; of all its blocks, the largest has `largest_quantized`."""
    of_blocks = [_quantized_in(block) for block in dict.fromkeys(model.blocks)]
    weights = [weight for block in of_blocks for weight in block]
    if not weights:
        return Codes()
    n = sum(weight.numel() for weight in weights)
    n_bytes = sum(part.numel() * part.element_size() for weight in weights for part in (weight.codes, weight.scales))
    largest = max(sum(weight.numel() for weight in block) for block in of_blocks)
    return Codes(n, largest, n_bytes / n, max(weight.numel() for weight in weights))


def _quantized_in(module: nn.Module) -> list[Quantized]:
    """The quantized weights of a module."""
    return [layer.weight for layer in module.modules() if isinstance(layer, QuantizedLinear)]


def expert_parameters(model: nn.Module, *, trainable: bool = False) -> int:
    """Parameters of routed experts, adapters on them among these."""
    return sum(n_parameters(module, trainable=trainable) for module in model.modules() if isinstance(module, Experts))


def largest_gradient(model: Model) -> int:
    """Parameters of the largest trained weight."""
    return max(p.numel() for p in model.parameters() if p.requires_grad)


def moments(optimizer: str, model: Model, kind: str | None = None, *, weight_bytes: int = 4) -> float:
    """Numbers of optimizer state per trained weight, as wide as a weight.

    kind: of `optimizer.moments`; int8 adds a scale of four bytes per block of a row, and keeps small weights in float32
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    total = sum(p.numel() for _, p in trained)
    single = {p for name, p in trained if optimizer == "muon" and is_hidden_matrix(name, p)}  # with momentum alone
    if kind is not None:
        n = {p: 1 if p in single or optimizer == "sgd" else 2 for _, p in trained}
        return sum(moment_bytes(p, kind, n=n[p]) for _, p in trained) / total / weight_bytes
    return MOMENTS.get(optimizer, 2.0) - sum(p.numel() for p in single) / total


def training_flops(model: Model, config: ModelConfig, seq_len: int, *, recomputed: float) -> float:
    """FLOPs of a training step per token: 6 N and attention, 2 less for each frozen weight in blocks.

    recomputed: share of the forward pass that runs again; a forward pass is a third of the total
    """
    flops = flops_per_token(model, config, seq_len)
    frozen = sum(multiplied(block, frozen=True) for block in model.blocks)
    return flops * (1 + recomputed / 3) - 2.0 * frozen
