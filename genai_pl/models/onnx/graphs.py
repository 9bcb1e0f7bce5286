"""Graphs: our models as functions of tensors alone, with the cache as inputs and outputs, which ONNX can express.

Names are those of transformers and Optimum: `attention_mask` is 1 where there is a token, (B, P + T) for P past tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from genai_pl.config.enums import Shape
from genai_pl.kernels import AttentionMask
from genai_pl.models.decoder import Decoder
from genai_pl.models.encoder import Encoder
from genai_pl.models.encoder_decoder import EncoderDecoder


class Past:
    """A cache for one call, with the interface that attention needs: it takes past keys and values and holds the longer ones.

    past: key and value (B, K, P, D) of each layer in turn. source: those of an encoder's output, for cross attention.
    """

    def __init__(self, past: Sequence[Tensor], source: Sequence[Tensor] = ()) -> None:
        self.tensors = list(past)  # key and value of each layer in turn
        self.source = {n: (source[2 * n], source[2 * n + 1]) for n in range(len(source) // 2)}

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, K, P + T, D) of the past and of the new tokens."""
        for n, new in ((2 * layer, k), (2 * layer + 1, v)):
            self.tensors[n] = torch.cat([self.tensors[n], new], dim=2)
        return self.tensors[2 * layer], self.tensors[2 * layer + 1]


class DecoderGraph(nn.Module):
    """Logits (B, T, V) of tokens that follow P past ones, and the keys and values of all of them."""

    def __init__(self, model: Decoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, past: list[Tensor]) -> tuple[Tensor, ...]:
        cache = Past(past)
        hidden = hidden_states(self.model, input_ids, attention_mask, cache=cache)
        return self.model.logits(hidden), *cache.tensors


class SourceGraph(nn.Module):
    """An encoder's hidden states (B, S, C), and the keys and values that each layer of the decoder makes of them, once."""

    def __init__(self, model: EncoderDecoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        hidden = hidden_states(self.model.encoder, input_ids, attention_mask)
        source_tensors = [t for block in self.model.decoder.blocks for t in block.cross.keys_and_values(hidden)]
        return hidden, *source_tensors


class DecoderWithSourceGraph(nn.Module):
    """`DecoderGraph` of a decoder that also attends to the keys and values of a source."""

    def __init__(self, model: EncoderDecoder) -> None:
        super().__init__()
        self.model = model.decoder

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        encoder_attention_mask: Tensor,
        past: list[Tensor],
        source: list[Tensor],
    ) -> tuple[Tensor, ...]:
        cache = Past(past, source)
        mask = AttentionMask(segments=encoder_attention_mask, query_segments=torch.ones_like(input_ids))
        hidden = hidden_states(self.model, input_ids, attention_mask, cache=cache, encoded_mask=mask)
        return self.model.logits(hidden), *cache.tensors


class PlainGraph(nn.Module):
    """A model without cache: logits (B, T, V) if it has a head, and hidden states (B, T, C); or scores (B, 1) alone."""

    def __init__(self, model: Encoder | Decoder) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        hidden = hidden_states(self.model, input_ids, attention_mask, types=token_type_ids)
        if self.model.score is not None:
            return self.model.score(_read_at(hidden, attention_mask, first=self.model.config.shape is Shape.encoder))
        return hidden if self.model.lm_head is None else (self.model.logits(hidden), hidden)


def hidden_states(
    model: Encoder | Decoder,
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    types: Tensor | None = None,
    **inputs: object,
) -> Tensor:
    """Hidden states (B, T, C) of the last T tokens of the mask (B, P + T); those of padding are finite and mean nothing.

    types (B, T): token types of an encoder. inputs: `cache` and `encoded_mask`, for `forward_blocks`.
    """
    T = input_ids.shape[1]
    positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)  # (B, P + T)
    x = model.embed_inputs(input_ids, positions[..., -T:], types)
    # padding is a document of its own: an ONNX softmax of a query that sees nothing is NaN, which spreads
    return model.forward_blocks(x, positions, 2 - attention_mask, **inputs)


def _read_at(hidden: Tensor, attention_mask: Tensor, *, first: bool) -> Tensor:
    """The hidden state (B, C) of the first or the last token that the mask shows."""
    token_positions = torch.arange(attention_mask.shape[1], device=hidden.device)
    ranks = attention_mask * (token_positions.flip(0) if first else token_positions) + attention_mask
    index = ranks.argmax(-1)[:, None, None].expand(-1, 1, hidden.shape[-1])
    return hidden.gather(1, index)[:, 0]
