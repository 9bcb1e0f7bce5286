"""Multi-head attention over (B, T, C): the projections around `kernels.attention`, positions of every kind, and the cache.

The layer of Vaswani et al. 2017, section 3.2, in four steps: project x to queries, keys and values; give queries and keys
their positions (rotary tables turn them, other kinds become a bias of the scores); append keys and values to the cache, if
there is one, and take back all of the past; attend, join the heads and project back to C channels.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from genai_pl.config.enums import AttentionKind, Position
from genai_pl.config.model import ModelConfig
from genai_pl.kernels import AttentionMask, ScoreOptions, attention_with
from genai_pl.kernels.efficient import Linformer, Performer, Reformer, WindowAttention
from genai_pl.models.kv_cache import KVCache
from genai_pl.models.layers import build_norm
from genai_pl.models.positions import alibi_slopes, rotate
from genai_pl.models.relative_positions import XLPositions

Rotary = tuple[Tensor, Tensor]


class AttentionInputs(NamedTuple):
    """All that a layer's attention reads besides x (B, T, C) and the mask; a field that a model does not need is None.

    rotary           cosines and sines, each (B or 1, 1, T, D), of the T queries' positions
    bias             (B or 1, H, T, S), added to the scores: T5's buckets, or ALiBi where positions are not columns
    token_positions  (B or 1, T), the column of each query among the S keys, for Transformer-XL's distances; None: all T in
                     their order
    segment_differs  (B, T, S), True where a key has another token type than the query (XLNet)
    source           (B, S, C), the states that keys and values are made of instead of x: an encoder's output, or the content
                     stream of permutation language modelling
    virtual_kv       (2, K, P, D), keys and values of P virtual tokens before all others
    cache            where keys and values of earlier calls are, and where the new ones go
    """

    rotary: Rotary | None = None
    bias: Tensor | None = None
    token_positions: Tensor | None = None
    segment_differs: Tensor | None = None
    source: Tensor | None = None
    virtual_kv: Tensor | None = None
    cache: KVCache | None = None


NO_INPUTS = AttentionInputs()


class Attention(nn.Module):
    """softmax(q k^T / sqrt(D)) v per head, joined by `o_proj` (Vaswani et al. 2017, eq. 1).

    config: sizes, biases, norms of queries and keys (`qk_norm`), the kind of positions and of attention. layer: the index of
    this layer, which is its place in the cache and the seed of its random features or hashes.

    Grouped queries (Ainslie et al. 2023): H query heads share K key heads, and only K are projected and cached.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        q_width, kv_width = config.n_head * config.head_dim, config.n_kv_head * config.head_dim
        # projections; the Reformer's keys are its queries
        keys_are_queries = config.attention_kind is AttentionKind.reformer
        self.q_proj = nn.Linear(config.n_embd, q_width, bias=config.qkv_bias)
        self.k_proj = None if keys_are_queries else nn.Linear(config.n_embd, kv_width, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.n_embd, kv_width, bias=config.qkv_bias)
        self.o_proj = nn.Linear(q_width, config.n_embd, bias=config.o_bias)
        # norms over the D channels of each head, or over all heads, keep scores in range in long runs (Dehghani et al. 2023)
        self.joint_norm = config.qk_norm_joint
        widths = (q_width, kv_width) if config.qk_norm_joint else (config.head_dim, config.head_dim)
        self.q_norm = build_norm(config, widths[0]) if config.qk_norm else nn.Identity()
        self.k_norm = build_norm(config, widths[1]) if config.qk_norm and not keys_are_queries else nn.Identity()
        # the scores
        self.sinks = nn.Parameter(torch.empty(config.n_head)) if config.attention_sinks else None
        self.dropout, self.softcap = config.dropout, config.softcap
        self.scale = config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale
        self.n_alibi = config.n_head if config.position is Position.alibi else 0
        self.xl = XLPositions(config) if config.position is Position.xl else None
        self.attend = build_attend(config, layer)

    def renumber(self, layer: int) -> None:
        """Make this the attention of another layer: its place in the cache, and the seed of its hashes once loaded."""
        self.layer = layer
        if isinstance(self.attend, Reformer):
            self.attend.seed = layer

    @property
    def column_layers(self) -> list[nn.Module]:
        """Column-parallel layers of tensor parallelism (Megatron): outputs split by head."""
        return [layer for layer in (self.q_proj, self.k_proj, self.v_proj) if layer is not None]

    @property
    def row_layers(self) -> list[nn.Module]:
        """Row-parallel layer of tensor parallelism (Megatron): inputs split by head."""
        return [self.o_proj]

    def forward(self, x: Tensor, mask: AttentionMask, inputs: AttentionInputs = NO_INPUTS) -> Tensor:
        """The output of the attention sublayer, before dropout and the residual addition, (B, T, C) -> (B, T, C)."""
        B, T, _ = x.shape
        # project, and turn queries by their positions
        q = self._normalized(self.q_norm, self.q_proj(x))  # (B, H, T, D)
        q = q if inputs.rotary is None else rotate(q, inputs.rotary)
        k, v = self._keys_and_values(x if inputs.source is None else inputs.source, q, inputs)  # (B, K, S, D)
        q = q.to(v.dtype)  # under autocast norms give float32
        # score and mix
        q, options = self._score_options(q, k, inputs)
        y = self.attend(q, k, v, mask, options)  # (B, H, T, D)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))  # (B, T, C)

    def _normalized(self, norm: nn.Module, x: Tensor) -> Tensor:
        """Queries or keys split into heads, (B, T, H D) -> (B, H, T, D), normalized before or after the split."""
        heads = (norm(x) if self.joint_norm else x).view(*x.shape[:2], -1, self.head_dim)
        return (heads if self.joint_norm else norm(heads)).transpose(1, 2)

    def _score_options(self, q: Tensor, k: Tensor, inputs: AttentionInputs) -> tuple[Tensor, ScoreOptions]:
        """The queries to multiply keys with, and what happens to the products.

        Position kinds other than rotary (XL, T5 bias, ALiBi) enter here.
        """
        bias = inputs.bias
        if self.xl is not None:
            T, S = q.shape[2], k.shape[2]
            columns = (
                torch.arange(T, device=q.device)[None] if inputs.token_positions is None else inputs.token_positions
            )
            q, bias = self.xl(q, columns, S, scale=self.scale, segment_differs=inputs.segment_differs)
        # an explicit bias already includes the ALiBi distances
        alibi = alibi_slopes(self.n_alibi, device=q.device) if self.n_alibi and bias is None else None
        dropout_p = self.dropout if self.training else 0.0
        scores = {"scale": self.scale, "softcap": self.softcap, "sinks": self.sinks}
        return q, ScoreOptions(**scores, bias=bias, alibi=alibi, dropout_p=dropout_p)

    def _keys_and_values(self, x: Tensor, q: Tensor | None, inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
        """Keys and values (B, K, S, D) of x (B, T, C), after those of virtual tokens and of the cache, which keeps them."""
        B, T, _ = x.shape
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)
        if self.k_proj is None:
            k = q
        else:
            k = self._normalized(self.k_norm, self.k_proj(x))
            k = k if inputs.rotary is None else rotate(k, inputs.rotary)  # keys are cached with their positions in them
        k = k.to(v.dtype)
        if inputs.virtual_kv is not None:  # (2, K, P, D)
            virtual_k, virtual_v = inputs.virtual_kv.to(v.dtype)[:, None].expand(-1, B, -1, -1, -1)
            k, v = torch.cat([virtual_k, k], dim=2), torch.cat([virtual_v, v], dim=2)
        return (k, v) if inputs.cache is None else inputs.cache.update(self.layer, k, v)


class CrossAttention(Attention):
    """Attention to a text that does not grow: its keys and values are made once per cache, at the first token."""

    def _keys_and_values(self, x: Tensor, q: Tensor | None, inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
        cache = inputs.cache
        if cache is None:
            return self.keys_and_values(x)
        if self.layer not in cache.source:
            cache.source[self.layer] = self.keys_and_values(x)
        return cache.source[self.layer]

    def keys_and_values(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, each (B, K, S, D), of a text (B, S, C)."""
        return super()._keys_and_values(source, None, NO_INPUTS)


def build_attend(
    config: ModelConfig, layer: int
) -> Callable[[Tensor, Tensor, Tensor, AttentionMask, ScoreOptions], Tensor]:
    """The function (q, k, v, mask, options) -> (B, H, T, D) of the configured kind: exact, windowed or approximate."""
    kind, backend = config.attention_kind, config.attention.value
    if kind is AttentionKind.window:
        return WindowAttention(window=config.window, n_global=config.n_global, backend=backend)
    if kind is AttentionKind.linformer:
        return Linformer(max_seq_len=config.max_seq_len, rank=config.linformer_rank, n_kv_head=config.n_kv_head)
    if kind is AttentionKind.performer:
        return Performer(head_dim=config.head_dim, n_features=config.performer_features, seed=layer)
    if kind is AttentionKind.reformer:
        return Reformer(n_hashes=config.reformer_hashes, bucket_size=config.reformer_bucket, seed=layer)
    return partial(attention_with, backend=backend)
