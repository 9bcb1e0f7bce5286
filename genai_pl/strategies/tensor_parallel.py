"""Tensor parallelism: heads, channels and words divided among ranks (Shoeybi et al. 2019, section 3).

In each part of a block a first layer is divided by output channels (`column_layers`: queries, keys, values, up, gate)
and a second by input channels (`row_layers`: o, down). Between them a rank works on its own heads or channels; only at
entry and exit do ranks communicate. The embedding and the head are divided by words. Models know nothing of it: hooks
and replaced `forward`s of their layers do the work, and parameters become DTensors, so checkpoints see full shapes.
"""

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from genai_pl.config.enums import AttentionKind, Position
from genai_pl.config.model import ModelConfig
from genai_pl.distributed.dtensor import local_shard
from genai_pl.distributed.tensor_parallel_group import TensorParallelGroup
from genai_pl.errors import ConfigError
from genai_pl.kernels import AttentionMask, ScoreOptions
from genai_pl.kernels.vocab_parallel import local_vocab_shard
from genai_pl.models import Block, TensorParallelLayer
from genai_pl.models.attention import Attention
from genai_pl.models.transformer import Transformer
from genai_pl.peft.lora import LoRALinear
from genai_pl.peft.prefix import Prefix
from genai_pl.peft.targets import base_module
from genai_pl.strategies.sequence_parallel import SequenceShards

ParameterSites = list[tuple[nn.Module, str]]  # of parameters


class LocalHeads(nn.Module):
    """Attention on the heads of this rank; biases and slopes that are made for all heads are sharded to them.

    attend: the attention function, or a module without weights
    mesh: of the tensor-parallel group
    """

    def __init__(self, attend: Callable[..., Tensor], mesh: DeviceMesh) -> None:
        super().__init__()
        self.attend, self.mesh = attend, mesh

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: AttentionMask,
        options: ScoreOptions,
    ) -> Tensor:
        options = options._replace(bias=self._shard(options.bias, 1), alibi=self._shard(options.alibi, 0))
        return self.attend(q, k, v, mask, options)

    def _shard(self, value: Tensor | None, dim: int) -> Tensor | None:
        """This rank's heads of a tensor of all heads along a dimension; None stays None."""
        if value is None:
            return None
        # a DTensor, so that the gradient is gathered again, for the table that all ranks hold
        all_heads = DTensor.from_local(value, self.mesh, [Replicate()], run_check=False)
        return all_heads.redistribute(placements=[Shard(dim)]).to_local()


def split_model(model: nn.Module, mesh: DeviceMesh, *, sequence_parallel: bool) -> ParameterSites:
    """Divide every block, the embedding and the head, in place.

    Returns the parameters (module, name) that stay unsharded although a rank sees only some of the heads or tokens
    that they
    work on: their gradients must be summed over ranks.
    """
    group, shared = TensorParallelGroup.of(mesh.get_group()), []
    for stack in (module for module in model.modules() if isinstance(module, Transformer)):
        shards = SequenceShards(stack, group) if sequence_parallel else None
        enter, leave = group.copy_to_region, group.reduce_from_region
        if shards is not None:
            enter, leave = shards.enter_region, shards.leave_region
        for block in dict.fromkeys(stack.blocks):
            shared += _split_block(block, mesh, group, enter, leave)
            shared += [] if shards is None else _unsharded_parameters(block)
        shared += [] if shards is None else _unsharded_parameters(stack.norm)
    _split_vocabulary(model, mesh, group)
    return list(dict.fromkeys(shared))


def _split_block(
    block: Block,
    mesh: DeviceMesh,
    group: TensorParallelGroup,
    enter: Callable[[Tensor], Tensor],
    leave: Callable[[Tensor], Tensor],
) -> ParameterSites:
    """Divide the parts of a block; returns the unsharded parameters that work on some heads.

    enter, leave: collectives at entry and exit of a part
    """

    def enter_part(_: nn.Module, args: tuple) -> tuple:
        x, *rest = args
        if rest and rest[-1].source is not None:  # of attention: an encoder's output, which all ranks hold in full
            *rest, inputs = rest
            rest = [*rest, inputs._replace(source=group.copy_to_region(inputs.source))]
        return enter(x), *rest

    shared: ParameterSites = []
    for part in block.parts:
        part.register_forward_pre_hook(enter_part)
        for layer in part.column_layers:
            shared += _split_columns(layer, mesh)
        for layer in part.row_layers:
            shared += _split_rows(layer, mesh, leave)
        if isinstance(part, Attention):
            part.attend = LocalHeads(part.attend, mesh)
            shared += _unsharded_parameters(part.q_norm) + _unsharded_parameters(part.k_norm)
    return shared


def _split_columns(layer: nn.Module, mesh: DeviceMesh) -> ParameterSites:
    """Divide a linear layer by output channels; LoRA's A, which all of them need, stays unsharded and is returned."""
    base = base_module(layer)
    _shard_parameters(base, mesh, {"weight": 0, "bias": 0})
    base.forward = lambda x: F.linear(
        x, local_shard(base.weight), None if base.bias is None else local_shard(base.bias)
    )
    if layer is base:
        return []
    _shard_parameters(layer, mesh, {"lora_B": 0})
    return [(layer, "lora_A")]


def _split_rows(layer: nn.Module, mesh: DeviceMesh, leave: Callable[[Tensor], Tensor]) -> ParameterSites:
    """Divide a linear layer by input channels, and sum its partial outputs by `leave`.

    LoRA's B stays unsharded and is returned. The bias is added after the sum, once.
    """
    base = base_module(layer)

    def reduce_output(_: nn.Module, args: tuple, y: Tensor) -> Tensor:
        y = leave(y)
        return y if base.bias is None else y + base.bias.to(y.dtype)

    _shard_parameters(base, mesh, {"weight": 1})
    base.forward = lambda x: F.linear(x, local_shard(base.weight))
    layer.register_forward_hook(reduce_output)
    if layer is base:
        return []
    _shard_parameters(layer, mesh, {"lora_A": 1})
    return [(layer, "lora_B")]


def _split_vocabulary(model: nn.Module, mesh: DeviceMesh, group: TensorParallelGroup) -> None:
    """Divide the words of embedding and head; a tied head stays tied."""
    _shard_parameters(model.embed, mesh, {"weight": 0})
    model.embed.forward = partial(_look_up, model.embed, group)
    parallelize_module(model.lm_head, mesh, ColwiseParallel(output_layouts=Replicate()))
    model.tie_weights()


def _shard_parameters(layer: nn.Module, mesh: DeviceMesh, dims: dict[str, int]) -> None:
    """Shard parameters of a layer, by name, along a dimension each."""
    for name, parameter in list(layer.named_parameters(recurse=False)):
        if name in dims:
            shard = distribute_tensor(parameter.detach(), mesh, [Shard(dims[name])])
            setattr(layer, name, nn.Parameter(shard, requires_grad=parameter.requires_grad))


def _unsharded_parameters(module: nn.Module) -> ParameterSites:
    """The parameters (module, name) of a module that are not DTensors."""
    return [
        (part, name)
        for part in module.modules()
        for name, parameter in part.named_parameters(recurse=False)
        if not isinstance(parameter, DTensor)
    ]


def _look_up(embed: nn.Embedding, group: TensorParallelGroup, tokens: Tensor) -> Tensor:
    """Embeddings (..., C) of tokens (...), each of which one rank holds: the others add zeros."""
    table, _, part = local_vocab_shard(embed.weight, None)
    own, places = part.find(tokens, table.shape[0])
    return group.reduce_from_region(F.embedding(places, table).masked_fill(~own[..., None], 0))


def check_split(model: nn.Module, size: int, *, sequence_parallel: bool) -> None:
    """ConfigError that names what cannot be divided among `size` ranks."""
    config, option = model.config, f"strategy.tensor_parallel_size ({size})"
    if not isinstance(config, ModelConfig) or not all(isinstance(block, Block) for block in model.blocks):
        raise ConfigError(f"{option}: only models of our own can be divided; use strategy=fsdp for this one")
    for name in ("n_head", "n_kv_head", "intermediate_size"):
        if getattr(config, name) % size:
            raise ConfigError(f"model.{name} ({getattr(config, name)}) must be divisible by {option}")
    if -(-config.vocab_size // size) * (size - 1) >= config.vocab_size:
        raise ConfigError(f"model.vocab_size ({config.vocab_size}) has no words for each of {option}")
    for name in ("n_experts", "qk_norm_joint", "attention_sinks"):
        if getattr(config, name):
            raise ConfigError(f"model.{name} cannot be divided by {option}; use strategy=fsdp")
    if config.position is Position.xl:
        raise ConfigError(f"model.position=xl cannot be divided by {option}; use strategy=fsdp")
    if config.attention_kind not in (AttentionKind.full, AttentionKind.window):
        raise ConfigError(f"model.attention_kind={config.attention_kind.value} cannot be divided by {option}")
    if sequence_parallel and config.share_layers:
        raise ConfigError("model.share_layers=true: strategy.sequence_parallel needs layers of their own")
    # adapters: LoRA on linear layers only
    parts = [part for block in model.blocks for part in block.parts]
    divisible = all(isinstance(part, TensorParallelLayer) for part in parts)  # an adapter around a part is none
    layers = [layer for part in parts for layer in (*part.column_layers, *part.row_layers)] if divisible else []
    ends = type(model.embed) is nn.Embedding and type(model.lm_head) is nn.Linear
    virtual = any(isinstance(module, Prefix) for module in model.modules())
    linear = all(type(layer) is nn.Linear or _is_plain_lora(layer) for layer in layers)
    if virtual or not ends or not divisible or not linear:
        raise ConfigError(f"{option}: of adapters only peft=lora on blocks, without DoRA and PiSSA; use strategy=fsdp")


def _is_plain_lora(layer: nn.Module) -> bool:
    """Whether a layer is LoRA on a linear layer, without DoRA and PiSSA."""
    if not isinstance(layer, LoRALinear) or type(layer.base) is not nn.Linear:
        return False
    return layer.magnitude is None and layer.start_A is None
