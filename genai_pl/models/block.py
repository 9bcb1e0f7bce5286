"""Block: one layer of a Transformer, attention and then MLP or experts, each added to the residual stream through a norm.

A decoder of an encoder-decoder has a third part between the two, attention to the encoder's output.
"""

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor, nn

from genai_pl.config.enums import AttentionKind, NormOrder, Position
from genai_pl.config.model import ModelConfig
from genai_pl.kernels import AttentionMask
from genai_pl.models.attention import NO_INPUTS, Attention, AttentionInputs, CrossAttention
from genai_pl.models.experts import MoE
from genai_pl.models.layers import MLP, GatedMLP, build_norm


class Block(nn.Module):
    """x + f(norm(x)) for each part f (pre-norm), norm(x + f(x)) (post-norm), or x + norm(f(norm(x))) (sandwich), on (B, T, C).

    Pre-norm keeps an unscaled path from the embeddings to the head, so that deep stacks train without a long warm-up (Xiong
    et al. 2020); post-norm is the paper's and BERT's; Gemma 3 has a norm on both sides of each part.

    config: sizes and kinds. layer: the index of this block. cross: whether it also attends to an encoder's output.
    """

    def __init__(self, config: ModelConfig, layer: int, *, cross: bool = False) -> None:
        super().__init__()
        self.pre_norm = config.norm_order is not NormOrder.post  # also true for sandwich
        sandwich = config.norm_order is NormOrder.sandwich
        has_norm = layer > 0 or config.first_norm
        self.norm1 = build_norm(config, config.n_embd) if has_norm else nn.Identity()
        self.attention = Attention(config, layer)
        self.norm1_after = build_norm(config, config.n_embd) if sandwich else nn.Identity()
        self.cross = None
        if cross:
            # no position bias or rotation: `learned` adds its positions to the embeddings and is neutral here
            plain = replace(config, position=Position.learned, attention_kind=AttentionKind.full)
            self.norm_cross = build_norm(config, config.n_embd)
            self.cross = CrossAttention(plain, layer)
        self.norm2 = build_norm(config, config.n_embd)
        self.is_mixture = layer in config.mixture_layers
        dense = GatedMLP if config.gated_mlp else MLP
        self.mlp = MoE(config) if self.is_mixture else dense(config)
        self.norm2_after = build_norm(config, config.n_embd) if sandwich else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)

    @property
    def parts(self) -> list[nn.Module]:
        """Attention, cross-attention where there is one, and MLP."""
        return [part for part in (self.attention, self.cross, self.mlp) if part is not None]

    def forward(
        self,
        x: Tensor,
        mask: AttentionMask,
        inputs: AttentionInputs = NO_INPUTS,
        *,
        encoded: Tensor | None = None,
        encoded_mask: AttentionMask | None = None,
    ) -> Tensor:
        """The residual stream after this layer, (B, T, C) -> (B, T, C).

        inputs: what attention to its own text reads. encoded (B, S, C) and its mask: the encoder's output. In permutation
        language modelling x is the query stream, which must not see its own tokens, and `inputs.source` the content
        stream, from which keys and values come.
        """
        if inputs.source is not None and self.pre_norm:
            inputs = inputs._replace(source=self.norm1(inputs.source))
        x = self._add(x, self.norm1, lambda y: self.norm1_after(self.attention(y, mask, inputs)))
        if self.cross is not None:
            cross_inputs = AttentionInputs(source=encoded, cache=inputs.cache)
            x = self._add(x, self.norm_cross, lambda y: self.cross(y, encoded_mask, cross_inputs))
        if not self.is_mixture:
            return self._add(x, self.norm2, lambda y: self.norm2_after(self.mlp(y)))
        # routers do not count padding
        real = None if mask.segments is None else mask.segments[:, -x.shape[1] :] != 0
        return self._add(x, self.norm2, lambda y: self.norm2_after(self.mlp(y, real)))

    def _add(self, x: Tensor, norm: nn.Module, part: Callable[[Tensor], Tensor]) -> Tensor:
        """x with one part added, the norm before or after it."""
        if self.pre_norm:
            return x + self.dropout(part(norm(x)))
        return norm(x + self.dropout(part(x)))
