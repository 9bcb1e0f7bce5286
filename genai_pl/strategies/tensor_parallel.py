"""Attention heads and the channels of the MLP divided among processes (Shoeybi et al. 2019, 3)."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from genai_pl.errors import ConfigError
from genai_pl.kernels import AttentionMask
from genai_pl.models import Block
from genai_pl.models.attention import Attention
from genai_pl.names import AttentionKind, Position
from genai_pl.specs import ModelConfig

COLUMNS, ROWS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), ("o_proj", "down_proj")
HEAD_NORMS = ("q_norm", "k_norm")


@dataclass
class LocalHeads:
    """Attention of this process's heads: what is given for all heads is cut to them."""

    attend: Callable[..., Tensor]
    mesh: DeviceMesh

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: AttentionMask,
        *,
        bias: Tensor | None,
        alibi: Tensor | None,
        **given: object,
    ) -> Tensor:
        return self.attend(q, k, v, mask, bias=self._cut(bias, 1), alibi=self._cut(alibi, 0), **given)

    def _cut(self, value: Tensor | None, dim: int) -> Tensor | None:
        if value is None:
            return None
        # the gradient of the cut is put together again, for the table that all processes hold
        all_heads = DTensor.from_local(value, self.mesh, [Replicate()], run_check=False)
        return all_heads.redistribute(placements=[Shard(dim)]).to_local()


def split_heads(model: nn.Module, mesh: DeviceMesh) -> None:
    """Divide every block, in place; embeddings, norms and the head are the same on all processes."""
    for block in dict.fromkeys(model.blocks):
        parts = [block.attention, block.mlp] + ([] if block.cross is None else [block.cross])
        for part in parts:
            parallelize_module(part, mesh, _plan(part))
            if isinstance(part, Attention):
                part.attend = LocalHeads(part.attend, mesh)


def _plan(part: nn.Module) -> dict[str, ParallelStyle]:
    plan: dict[str, ParallelStyle] = {}
    for name, module in part.named_children():
        if name in COLUMNS:
            plan[name] = ColwiseParallel()
        elif name in ROWS:
            plan[name] = RowwiseParallel()
        elif name in HEAD_NORMS and not isinstance(module, nn.Identity):
            # over (B, T, H, D): its weight gets gradients of all heads
            plan[name] = SequenceParallel(sequence_dim=2, use_local_output=True)
    return plan


def check_heads(model: nn.Module, size: int) -> None:
    """ConfigError that names what cannot be divided among `size` processes."""
    config, option = model.config, f"strategy.tensor_parallel_size ({size})"
    if not isinstance(config, ModelConfig) or not all(isinstance(block, Block) for block in model.blocks):
        raise ConfigError(f"{option}: only models of our own can be divided; use strategy=fsdp for this one")
    for name in ("n_head", "n_kv_head", "intermediate_size"):
        if getattr(config, name) % size:
            raise ConfigError(f"model.{name} ({getattr(config, name)}) must be divisible by {option}")
    if config.position is Position.xl:
        raise ConfigError(f"model.position=xl cannot be divided by {option}; use strategy=fsdp")
    if config.attention_kind not in (AttentionKind.full, AttentionKind.window):
        raise ConfigError(f"model.attention_kind={config.attention_kind.value} cannot be divided by {option}")
    layers = [m for b in model.blocks for n, m in b.named_modules() if n.rpartition(".")[2] in COLUMNS + ROWS]
    if not all(type(layer) is nn.Linear for layer in layers):
        raise ConfigError(f"{option}: adapters of peft cannot be divided; use strategy=fsdp")
