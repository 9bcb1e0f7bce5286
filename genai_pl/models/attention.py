"""Multi-head attention over (B, T, C), with grouped keys, QK-norm, positions of every kind and a cache."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from genai_pl.config.enums import AttentionKind, Position
from genai_pl.config.model import ModelConfig
from genai_pl.kernels import AttentionMask, attention
from genai_pl.kernels.efficient import Linformer, Performer, Reformer, WindowAttention
from genai_pl.models.kv_cache import KVCache
from genai_pl.models.layers import build_norm
from genai_pl.models.positions import alibi_slopes, rotate
from genai_pl.models.relative_positions import XLPositions

Rotary = tuple[Tensor, Tensor]


class Attention(nn.Module):
    """softmax(q k' / sqrt(D)) v per head, joined by `o_proj` (Vaswani et al. 2017, eq. 1).

    Keys and values are made of the same text as the queries, or of `source` (B, S, C): an encoder's output, or the
    content_stream stream of permutation language modelling.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        n_q, n_kv = config.n_head * config.head_dim, config.n_kv_head * config.head_dim
        self.q_proj = nn.Linear(config.n_embd, n_q, bias=config.qkv_bias)
        # the Reformer's keys are its queries
        shared = config.attention_kind is AttentionKind.reformer
        self.k_proj = None if shared else nn.Linear(config.n_embd, n_kv, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.n_embd, n_kv, bias=config.qkv_bias)
        self.o_proj = nn.Linear(n_q, config.n_embd, bias=config.o_bias)
        self.q_norm = build_norm(config, config.head_dim) if config.qk_norm else nn.Identity()
        self.k_norm = build_norm(config, config.head_dim) if config.qk_norm and not shared else nn.Identity()
        self.dropout, self.softcap = config.dropout, config.softcap
        self.scale = config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale
        self.n_alibi = config.n_head if config.position is Position.alibi else 0
        self.xl = XLPositions(config) if config.position is Position.xl else None
        self.attend = build_attend(config, layer)

    def forward(
        self,
        x: Tensor,
        mask: AttentionMask,
        *,
        rotary: Rotary | None = None,
        bias: Tensor | None = None,
        token_positions: Tensor | None = None,
        segment_differs: Tensor | None = None,
        source: Tensor | None = None,
        virtual_kv: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        B, T, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(B, T, -1, self.head_dim)).transpose(1, 2)  # (B, H, T, D)
        q = q if rotary is None else rotate(q, rotary)
        k, v = self._keys_and_values(x if source is None else source, rotary, cache, q, virtual_kv)  # (B, K, S, D)
        q = q.to(v.dtype)  # under autocast norms give float32
        if self.xl is not None:
            token_positions = torch.arange(T, device=x.device)[None] if token_positions is None else token_positions
            q, bias = self.xl(q, token_positions, k.shape[2], scale=self.scale, segment_differs=segment_differs)
        y = self.attend(
            q,
            k,
            v,
            mask,
            scale=self.scale,
            bias=bias,
            # a bias has the distances in it
            alibi=alibi_slopes(self.n_alibi, device=x.device) if self.n_alibi and bias is None else None,
            softcap=self.softcap,
            dropout_p=self.dropout if self.training else 0.0,
        )
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))  # (B, T, C)

    def _keys_and_values(
        self,
        x: Tensor,
        rotary: Rotary | None,
        cache: KVCache | None,
        q: Tensor | None,
        virtual_kv: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        B, T, _ = x.shape
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)
        if self.k_proj is None:
            k = q
        else:
            k = self.k_norm(self.k_proj(x).view(B, T, -1, self.head_dim)).transpose(1, 2)
            k = k if rotary is None else rotate(k, rotary)
        k = k.to(v.dtype)
        if virtual_kv is not None:  # (2, K, P, D), in front of all others
            k, v = (
                torch.cat([new.to(v.dtype).expand(B, -1, -1, -1), y], 2)
                for new, y in zip(virtual_kv, (k, v), strict=True)
            )
        return (k, v) if cache is None else cache.update(self.layer, k, v)


class CrossAttention(Attention):
    """Attention to a text that does not grow: its keys and values are made once per cache."""

    def _keys_and_values(
        self,
        x: Tensor,
        rotary: Rotary | None,
        cache: KVCache | None,
        q: Tensor | None,
        virtual_kv: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        if cache is None:
            return self.keys_and_values(x)
        if self.layer not in cache.source:
            cache.source[self.layer] = self.keys_and_values(x)
        return cache.source[self.layer]

    def keys_and_values(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """Of a text (B, S, C), each (B, K, S, D)."""
        return super()._keys_and_values(source, None, None, None)


def build_attend(config: ModelConfig, layer: int) -> Callable[..., Tensor]:
    """What turns queries, keys, values and a mask into outputs, called as `attention` is."""
    kind, backend = config.attention_kind, config.attention.value
    if kind is AttentionKind.window:
        return WindowAttention(window=config.window, n_global=config.n_global, backend=backend)
    if kind is AttentionKind.linformer:
        return Linformer(max_seq_len=config.max_seq_len, rank=config.linformer_rank, n_kv_head=config.n_kv_head)
    if kind is AttentionKind.performer:
        return Performer(head_dim=config.head_dim, n_features=config.performer_features, seed=layer)
    if kind is AttentionKind.reformer:
        return Reformer(n_hashes=config.reformer_hashes, bucket_size=config.reformer_bucket, seed=layer)
    return partial(attention, backend=backend)
