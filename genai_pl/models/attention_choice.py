"""Attention choice: what `model.attention=auto` becomes on a GPU, by a probe of the model's own shape."""

import logging
from typing import TYPE_CHECKING

import torch
from torch import nn

from genai_pl.config.enums import AttentionBackend, AttentionKind, Position, Shape
from genai_pl.config.model import ModelConfig
from genai_pl.kernels.attention_probe import (
    Choice,
    ProbeShape,
    cached_choice,
    candidates_for,
    choose,
    gpu_clock,
    machine_of,
    table_file,
)
from genai_pl.kernels.preference import prefer

if TYPE_CHECKING:
    from genai_pl.models.hf.transformers_config import WrappedConfig

log = logging.getLogger(__name__)

READ = 1024  # tokens of a row that a command reads, where nobody knows
LONGEST = 8192  # tokens of a row that is timed: kernels keep their order beyond, and a dense mask would fill the memory


def probe_shape(
    model: nn.Module, dtype: torch.dtype, *, length: int, backward: bool, compiled: bool = False
) -> ProbeShape | None:
    """The shape that a probe measures for a model, with products in dtype; None where auto decides nothing.

    length: tokens of a row. backward, compiled: of `ProbeShape`.
    """
    config: ModelConfig | WrappedConfig = model.config
    own = isinstance(config, ModelConfig)
    ours = own or model.route.ours  # else transformers' own attention runs
    exact = config.attention_kind in (AttentionKind.full, AttentionKind.window)
    if config.attention is not AttentionBackend.auto or not (ours and exact):
        return None
    return ProbeShape(
        n_head=config.n_head,
        n_kv_head=config.n_kv_head,
        head_dim=config.head_dim,
        dtype=dtype,
        length=min(length, LONGEST),
        causal=config.shape is not Shape.encoder,
        window=config.window,
        softcap=config.softcap,
        sinks=own and config.attention_sinks,
        alibi=own and config.position is Position.alibi,
        bias=own and config.position in (Position.relative, Position.xl),
        dropout=config.dropout,
        backward=backward,
        compiled=compiled,
    )


def prefer_fastest(
    shape: ProbeShape | None, device: torch.device, *, keep: tuple[str, ...] | None = None
) -> Choice | None:
    """The choice of a probe on this GPU, which `attention` follows from now on in this process; None on other devices.

    keep: the order of a run that goes on, which is checked and not measured again.
    """
    if shape is None or device.type != "cuda":
        return None
    given = {"clock": gpu_clock, "attends": candidates_for(shape, device)}
    if keep is None:
        choice = cached_choice(shape, device, machine=machine_of(device), file=table_file(), **given)
    else:
        choice = choose(shape, device, keep=keep, **given)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    prefer(choice.preference())
    return choice


def move_to(model: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The model on its device, where a command reads with it; on a GPU with the fastest attention, which the log names.

    dtype: of products.
    """
    model = model.to(device)
    if device.type != "cuda":
        return model
    length = min(READ, model.config.max_seq_len)
    choice = prefer_fastest(probe_shape(model, dtype, length=length, backward=False), device)
    for line in choice.lines() if choice else []:
        log.info("attention   %s", line)
    return model
