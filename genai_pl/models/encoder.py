"""Encoder: BERT, RoBERTa, ALBERT, T5's first half, and XLNet with its second stream, by configuration.

Every token sees its whole document in both directions, so there is nothing to cache and nothing to decode: an encoder
fills masks, embeds texts, or is read by a decoder. Virtual tokens stand before every document here, not once per row,
because a document must see its own and no other.
"""

from functools import partial

import torch
from torch import Tensor, nn

from genai_pl.config.enums import Position
from genai_pl.config.model import ModelConfig
from genai_pl.kernels import AttentionMask, positions_from_segments
from genai_pl.models.attention import AttentionInputs
from genai_pl.models.transformer import Transformer
from genai_pl.models.virtual_tokens import NO_PREFIX, Interleaved, VirtualPrefix, interleave


class Encoder(Transformer):
    """Hidden states and logits of input_ids (B, T), where every token sees its whole document.

    segment_ids (B, T): 0 is padding, 1.. the documents of a packed row; None: each row is one document. With Transformer-XL
    positions the model has a parameter `unseen` (C,), the query stream's first state, the same for every position.
    """

    causal = False
    feature_methods = ("features", "permuted_features")

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.unseen = nn.Parameter(torch.empty(config.n_embd)) if config.position is Position.xl else None
        if self.unseen is not None:
            nn.init.normal_(self.unseen, std=config.init_std)

    def forward(self, input_ids: Tensor, segment_ids: Tensor | None = None, **options: Tensor | None) -> Tensor:
        """Logits (B, T, V) in the dtype of the weights; `options` are those of `features`."""
        return self.logits(self.features(input_ids, segment_ids, **options))

    def features(
        self, input_ids: Tensor, segment_ids: Tensor | None = None, *, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """Hidden states (B, T, C); token_type_ids (B, T): the part of its document a token is in, as BERT's two sentences."""
        hidden, _, interleaved = self.encode(input_ids, segment_ids, token_type_ids=token_type_ids)
        return hidden if interleaved is None else interleaved.text(hidden)

    def encode(
        self, input_ids: Tensor, segment_ids: Tensor | None = None, *, token_type_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Interleaved | None]:
        """The output for a decoder: hidden states (B, S, C) with those of virtual tokens, their segments, the text's columns.

        The third is None where no virtual tokens are among the states; then S is T.
        """
        virtual = self.virtual_prefix(is_first_call=True)
        if virtual.embeddings is not None:
            return self._encode_interleaved(input_ids, segment_ids, token_type_ids, virtual)
        x, positions, segments = self._embed(input_ids, segment_ids, token_type_ids, virtual)
        hidden = self.forward_blocks(
            x, positions, segments, virtual=virtual, segment_differs=self._segment_differs(token_type_ids)
        )
        return hidden, segment_ids, None

    def _encode_interleaved(
        self, input_ids: Tensor, segment_ids: Tensor | None, types: Tensor | None, virtual: VirtualPrefix
    ) -> tuple[Tensor, Tensor | None, Interleaved]:
        """`encode` with embeddings of virtual tokens put before each document."""
        rows = interleave(segment_ids, virtual, *input_ids.shape, input_ids.device)
        segments, S = rows.segments, rows.index.shape[1]
        self.check_length(virtual.n + input_ids.shape[1])
        positions = _positions(segments, S, input_ids.device)
        types = None if types is None else types.new_zeros(rows.index.shape).scatter(1, rows.token_positions, types)
        x = self.embed_inputs(input_ids, positions, types, insert_virtual=partial(rows.insert, virtual.embeddings))
        return self.forward_blocks(x, positions, segments), segments, rows

    def permuted_features(
        self, input_ids: Tensor, order: Tensor, targets: Tensor, segment_ids: Tensor | None = None
    ) -> Tensor:
        """Hidden states (B, M, C) at the columns `targets` (B, M), which do not know the tokens that stand there.

        order (B, T): the rank of each token in the permutation. Two streams run through the same blocks (Yang et al. 2019,
        section 2.3): the content stream, where a token sees those of its rank or lower, and the query stream, which begins
        as `unseen` at every target and sees lower ranks only. Keys and values of both come from the content stream.
        """
        # masks: content sees up to its own rank, a query strictly less
        x, _, _ = self._embed(input_ids, segment_ids, None, NO_PREFIX)
        content = AttentionMask(segments=segment_ids, order=order)
        query_segments = None if segment_ids is None else segment_ids.gather(1, targets)
        query = AttentionMask(
            segments=segment_ids,
            query_segments=query_segments,
            order=order,
            query_order=order.gather(1, targets),
            strict=True,
        )
        # the streams
        unseen = self.dropout(self.unseen.to(x.dtype).expand(*targets.shape, -1))  # (B, M, C)
        for n, block in enumerate(self.blocks, 1):
            unseen = block(unseen, query, AttentionInputs(token_positions=targets, source=x))
            x = block(x, content) if n < len(self.blocks) else x  # no block follows that reads it
        return self.norm(unseen)

    def _embed(
        self, input_ids: Tensor, segment_ids: Tensor | None, types: Tensor | None, virtual: VirtualPrefix
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The input of the first block (B, T, C), and positions and segments of all keys, virtual ones included."""
        T = input_ids.shape[1]
        self.check_length(virtual.n + T)
        positions = _positions(segment_ids, T, input_ids.device)
        segments, positions = virtual.prepend_positions(segment_ids, positions, explicit=False)
        return self.embed_inputs(input_ids, positions[..., -T:], types), positions, segments

    def _segment_differs(self, types: Tensor | None) -> Tensor | None:
        """True where a key (last) has another token type than the query, (B, T, T); None for models without type scores."""
        if types is None or self.unseen is None:
            return None
        return types[:, :, None] != types[:, None, :]


def _positions(segments: Tensor | None, T: int, device: torch.device) -> Tensor:
    """The position of each token in its document, (T,) or (B, T)."""
    return torch.arange(T, device=device) if segments is None else positions_from_segments(segments)
