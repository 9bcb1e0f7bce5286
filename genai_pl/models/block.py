"""One layer: attention and MLP, each with its residual and norm."""

from torch import Tensor, nn

from genai_pl.kernels import AttentionMask
from genai_pl.models.attention import Attention
from genai_pl.models.cache import KVCache
from genai_pl.models.layers import MLP, GatedMLP, build_norm
from genai_pl.specs import ModelConfig, NormOrder


class Block(nn.Module):
    """Twice x + f(norm(x)) (pre-norm), or norm(x + f(x)) (post-norm, Vaswani et al. 2017), on (B, T, C)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.norm1 = build_norm(config, config.n_embd)
        self.attention = Attention(config, layer)
        self.norm2 = build_norm(config, config.n_embd)
        self.mlp = GatedMLP(config) if config.gated_mlp else MLP(config)
        self.dropout = nn.Dropout(config.dropout)
        self.pre_norm = config.norm_order is NormOrder.pre

    def forward(
        self,
        x: Tensor,
        mask: AttentionMask,
        *,
        rotary: tuple[Tensor, Tensor] | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        if self.pre_norm:
            x = x + self.dropout(self.attention(self.norm1(x), mask, rotary=rotary, cache=cache))
            return x + self.dropout(self.mlp(self.norm2(x)))
        x = self.norm1(x + self.dropout(self.attention(x, mask, rotary=rotary, cache=cache)))
        return self.norm2(x + self.dropout(self.mlp(x)))
