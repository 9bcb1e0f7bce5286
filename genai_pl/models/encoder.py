"""The encoder: BERT, RoBERTa, ALBERT, and XLNet with its second stream, by configuration."""

from functools import partial

import torch
from torch import Tensor, nn

from genai_pl.config.enums import Position
from genai_pl.config.model import ModelConfig
from genai_pl.kernels import AttentionMask, positions_from_segments
from genai_pl.models.transformer import Transformer
from genai_pl.models.virtual_tokens import NO_PREFIX, Interleaved, VirtualPrefix, interleave


class Encoder(Transformer):
    """Hidden states and logits of input_ids (B, T), where every token sees its whole document."""

    causal = False

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        # what the query stream of permutation language modelling begins with, for every position the same
        self.unseen = nn.Parameter(torch.empty(config.n_embd)) if config.position is Position.xl else None
        if self.unseen is not None:
            nn.init.normal_(self.unseen, std=config.init_std)

    def forward(self, input_ids: Tensor, segment_ids: Tensor | None = None, **given: Tensor | None) -> Tensor:
        """Logits (B, T, V) in the dtype of the weights; segment_ids (B, T): 0 is padding, 1.. the row's documents."""
        return self.logits(self.features(input_ids, segment_ids, **given))

    def features(
        self, input_ids: Tensor, segment_ids: Tensor | None = None, *, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """Hidden states (B, T, C); token_type_ids (B, T) tell the parts of a document apart."""
        hidden, _, interleaved = self.encode(input_ids, segment_ids, token_type_ids=token_type_ids)
        return hidden if interleaved is None else interleaved.text(hidden)

    def encode(
        self, input_ids: Tensor, segment_ids: Tensor | None = None, *, token_type_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Interleaved | None]:
        """Hidden states (B, S, C), those of virtual tokens among them, their segments, and where the text is."""
        virtual = self.virtual_prefix(enters=True)
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
        """Hidden states (B, M, C) at the positions `targets` (B, M), which do not know the tokens that stand there.

        A token sees those of its rank in `order` (B, T) or lower; a target only lower ones (Yang et al. 2019, 2.3).
        """
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
        unseen = self.dropout(self.unseen.to(x.dtype).expand(*targets.shape, -1))  # (B, M, C)
        for n, block in enumerate(self.blocks, 1):
            unseen = block(unseen, query, token_positions=targets, content_stream=x)
            x = block(x, content) if n < len(self.blocks) else x  # the last content is read by nobody
        return self.norm(unseen)

    def _embed(
        self, input_ids: Tensor, segment_ids: Tensor | None, types: Tensor | None, virtual: VirtualPrefix
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The input of the first block (B, T, C), and positions and segments of all keys."""
        T = input_ids.shape[1]
        self.check_length(virtual.n + T)
        positions = _positions(segment_ids, T, input_ids.device)
        segments, positions = virtual.prepend_positions(segment_ids, positions, explicit=False)
        return self.embed_inputs(input_ids, positions[..., -T:], types), positions, segments

    def _segment_differs(self, types: Tensor | None) -> Tensor | None:
        """Where a key (second) is of another token type than the query (first), (B, T, T), if scores depend on it."""
        if types is None or self.unseen is None:
            return None
        return types[:, :, None] != types[:, None, :]


def _positions(segments: Tensor | None, T: int, device: torch.device) -> Tensor:
    """Of each token in its document, (T,) or (B, T)."""
    return torch.arange(T, device=device) if segments is None else positions_from_segments(segments)
