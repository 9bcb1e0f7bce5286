"""Context parallelism: the tokens of each row divided among ranks, for contexts that one device cannot hold.

Every rank has all layers (FSDP shards their weights over these ranks too) and computes embeddings, norms, projections, MLPs
and the loss for its own tokens. Only attention looks at the others: keys and values are gathered, which grouped queries
make small beside the hidden states, and each rank's queries are some rows of the whole mask (Llama Team 2024, section
3.3.2). So documents, windows and shared prompts are exact. Models know nothing of it beyond the group that they hold for
losses: their embedding of inputs, their stack and the attention function of each layer are wrapped here.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genai_pl.config.enums import AttentionKind, Position, Shape
from genai_pl.config.model import ModelConfig
from genai_pl.distributed.context_group import ContextGroup
from genai_pl.errors import ConfigError
from genai_pl.kernels import AttentionMask, ScoreOptions
from genai_pl.models import Model
from genai_pl.models.attention import Attention
from genai_pl.models.transformer import Transformer
from genai_pl.modules.base import BaseModule
from genai_pl.modules.token_prediction import TokenModule


class ChunkAttention(nn.Module):
    """Attention of this rank's queries, two chunks of each row, to the keys and values of all ranks.

    attend: the attention function, or a module without weights
    group: of the ranks that share the tokens of a row
    """

    def __init__(self, attend: Callable[..., Tensor], group: ContextGroup) -> None:
        super().__init__()
        self.attend, self.group = attend, group

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, options: ScoreOptions) -> Tensor:
        """(B, H, t, D) of q (B, H, t, D), k and v (B, K, t, D); the mask is that of whole rows."""
        k, v = self.group.gather_keys(k, v)  # (B, K, S, D)
        S, c = k.shape[2], q.shape[2] // 2
        parts = []
        for start, queries in zip(self.group.chunk_starts(S), q.split(c, dim=2), strict=True):
            rows, n_keys = mask.rows(start, start + c, S, q.device)
            y = self.attend(queries, k[:, :, :n_keys], v[:, :, :n_keys], rows, options)
            parts.append(y.transpose(1, 2))
        return torch.cat(parts, dim=1).transpose(1, 2)  # joining the heads of a token then copies nothing


def split_sequences(model: Model, group: ContextGroup) -> None:
    """Make a model compute the hidden states of this rank's tokens, in place; `features` still takes whole rows."""
    model.context_group = group
    model.embed_inputs = partial(_embed_own, model.embed_inputs, group)
    model.forward_blocks = partial(_run_own, model, model.forward_blocks, group)
    for layer in model.modules():
        if isinstance(layer, Attention):
            layer.attend = ChunkAttention(layer.attend, group)


def _embed_own(
    embed_inputs: Callable[..., Tensor],
    group: ContextGroup,
    input_ids: Tensor,
    positions: Tensor,
    token_type_ids: Tensor | None = None,
    **options: object,
) -> Tensor:
    """The input of the first block for this rank's tokens, (B, t, C), of whole rows (B, T)."""
    types = None if token_type_ids is None else group.shard(token_type_ids)
    return embed_inputs(group.shard(input_ids), group.shard(positions), types, **options)


def _run_own(
    stack: Transformer,
    forward_blocks: Callable[..., Tensor],
    group: ContextGroup,
    x: Tensor,
    positions: Tensor,
    segments: Tensor | None,
    **options: object,
) -> Tensor:
    """The hidden states of this rank's tokens; positions (T,) or (B, T) and segments (B, T) are those of whole rows."""
    T = positions.shape[-1]
    padding = group.padded(T) - T
    if segments is None and padding and not stack.causal:  # no query may see the padding, which a causal mask hides
        segments = torch.ones(x.shape[0], T, dtype=torch.long, device=x.device)
    segments = None if segments is None else F.pad(segments, (0, padding))
    return forward_blocks(x, group.shard(positions), segments, **options)


def check_sequences(objective: type[BaseModule], models: Sequence[nn.Module], size: int) -> None:
    """ConfigError that names the objective, option or adapter that context parallelism of `size` ranks cannot take.

    models: the trained one, and the reference
    """
    option = f"strategy.context_parallel_size ({size})"
    if not objective.divides_sequences:
        raise ConfigError(
            f"{option} is for objectives of tokens and preferences (clm, sft, fim, prefix_lm, mlm, dpo, kto), not this "
            "one: set it to 1"
        )
    for model in models:
        _check_model(model, option)
    if models[0].config.position is Position.alibi and not issubclass(objective, TokenModule):
        raise ConfigError(
            f"{option}: model.position=alibi does not go with pairs; set it to 1, or model.position=rotary"
        )


def _check_model(model: nn.Module, option: str) -> None:
    """ConfigError for a model whose tokens cannot be divided."""
    config = model.config
    if not isinstance(config, ModelConfig) or config.shape is Shape.encoder_decoder:
        raise ConfigError(f"{option}: only decoders and encoders of our own are divided by tokens; set it to 1")
    if config.position in (Position.relative, Position.xl):
        raise ConfigError(
            f"{option}: model.position={config.position.value} has a bias for each pair of tokens; set it to 1"
        )
    if config.attention_kind not in (AttentionKind.full, AttentionKind.window):
        raise ConfigError(f"{option}: model.attention_kind={config.attention_kind.value} is not divided by tokens")
    if not model.causal and (config.window is not None or config.position is Position.alibi):
        raise ConfigError(f"{option}: an encoder with model.window or model.position=alibi is not divided by tokens")
    if config.n_experts:
        raise ConfigError(f"{option}: model.n_experts is not divided by tokens; use strategy.expert_parallel_size")
    if model.virtual is not None:
        raise ConfigError(f"{option}: of adapters not peft=prompt and peft=prefix, whose tokens no text has")
