"""Multi-head attention over (B, T, C), with grouped keys, QK-norm, rotary positions and a cache."""

from torch import Tensor, nn

from genai_pl.kernels import AttentionMask, attention
from genai_pl.models.cache import KVCache
from genai_pl.models.layers import build_norm
from genai_pl.models.positions import alibi_slopes, rotate
from genai_pl.specs import ModelConfig, Position


class Attention(nn.Module):
    """softmax(q k' / sqrt(D)) v per head, joined by `o_proj` (Vaswani et al. 2017, eq. 1)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        n_q, n_kv = config.n_head * config.head_dim, config.n_kv_head * config.head_dim
        self.q_proj = nn.Linear(config.n_embd, n_q, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.n_embd, n_kv, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.n_embd, n_kv, bias=config.qkv_bias)
        self.o_proj = nn.Linear(n_q, config.n_embd, bias=config.bias)
        self.q_norm = build_norm(config, config.head_dim) if config.qk_norm else nn.Identity()
        self.k_norm = build_norm(config, config.head_dim) if config.qk_norm else nn.Identity()
        self.dropout, self.softcap, self.backend = config.dropout, config.softcap, config.attention.value
        self.n_alibi = config.n_head if config.position is Position.alibi else 0

    def forward(
        self,
        x: Tensor,
        mask: AttentionMask,
        *,
        rotary: tuple[Tensor, Tensor] | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        B, T, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(B, T, -1, self.head_dim)).transpose(1, 2)  # (B, H, T, D)
        k = self.k_norm(self.k_proj(x).view(B, T, -1, self.head_dim)).transpose(1, 2)  # (B, K, T, D)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, K, T, D)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        q, k = q.to(v.dtype), k.to(v.dtype)  # under autocast norms give float32
        if cache is not None:
            k, v = cache.update(self.layer, k, v)  # (B, K, S, D)
        y = attention(
            q,
            k,
            v,
            mask,
            alibi=alibi_slopes(self.n_alibi, device=x.device) if self.n_alibi else None,
            softcap=self.softcap,
            dropout_p=self.dropout if self.training else 0.0,
            backend=self.backend,
        )
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))  # (B, T, C)
