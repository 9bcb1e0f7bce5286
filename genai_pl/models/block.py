"""One layer: attention, in a decoder that reads a source also attention to that, and MLP; each with residual and norm."""

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor, nn

from genai_pl.config.enums import AttentionKind, NormOrder, Position
from genai_pl.config.model import ModelConfig
from genai_pl.kernels import AttentionMask
from genai_pl.models.attention import Attention, CrossAttention, Rotary
from genai_pl.models.kv_cache import KVCache
from genai_pl.models.layers import MLP, GatedMLP, build_norm


class Block(nn.Module):
    """x + f(norm(x)) for each part f (pre-norm), norm(x + f(x)) (post-norm), or x + norm(f(norm(x))), on (B, T, C)."""

    def __init__(self, config: ModelConfig, layer: int, *, cross: bool = False) -> None:
        super().__init__()
        self.pre_norm = config.norm_order is not NormOrder.post
        sandwich = config.norm_order is NormOrder.sandwich
        self.norm1 = build_norm(config, config.n_embd)
        self.attention = Attention(config, layer)
        self.norm1_after = build_norm(config, config.n_embd) if sandwich else nn.Identity()
        self.cross = None
        if cross:  # the segment_differs text has token_positions of its own
            plain = replace(config, position=Position.learned, attention_kind=AttentionKind.full)
            self.norm_cross = build_norm(config, config.n_embd)
            self.cross = CrossAttention(plain, layer)
        self.norm2 = build_norm(config, config.n_embd)
        self.mlp = GatedMLP(config) if config.gated_mlp else MLP(config)
        self.norm2_after = build_norm(config, config.n_embd) if sandwich else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        mask: AttentionMask,
        *,
        rotary: Rotary | None = None,
        bias: Tensor | None = None,
        token_positions: Tensor | None = None,
        segment_differs: Tensor | None = None,
        content_stream: Tensor | None = None,
        source: Tensor | None = None,
        source_mask: AttentionMask | None = None,
        virtual_kv: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """The next layer's x; keys come from `content_stream` where x is the query stream of it, and `source` is another text.

        virtual_kv (2, K, P, D) are keys and values before those of the text.
        """
        if content_stream is not None and self.pre_norm:
            content_stream = self.norm1(content_stream)
        given = {
            "rotary": rotary,
            "bias": bias,
            "token_positions": token_positions,
            "segment_differs": segment_differs,
            "source": content_stream,
            "cache": cache,
        }
        given["virtual_kv"] = virtual_kv
        x = self._add(x, self.norm1, lambda y: self.norm1_after(self.attention(y, mask, **given)))
        if self.cross is not None:
            x = self._add(x, self.norm_cross, lambda y: self.cross(y, source_mask, source=source, cache=cache))
        return self._add(x, self.norm2, lambda y: self.norm2_after(self.mlp(y)))

    def _add(self, x: Tensor, norm: nn.Module, part: Callable[[Tensor], Tensor]) -> Tensor:
        if self.pre_norm:
            return x + self.dropout(part(norm(x)))
        return norm(x + self.dropout(part(x)))
