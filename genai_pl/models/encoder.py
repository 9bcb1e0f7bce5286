"""The encoder: BERT, RoBERTa, ALBERT, and XLNet with its second stream, by configuration."""

import torch
from torch import Tensor, nn

from genai_pl.kernels import AttentionMask, positions_from_segments
from genai_pl.models.stack import Stack
from genai_pl.names import Position
from genai_pl.specs import ModelConfig


class Encoder(Stack):
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
        x, positions = self._begin(input_ids, segment_ids, token_type_ids)
        other = self._other(token_type_ids)
        return self.run(x, positions, segment_ids, S=input_ids.shape[1], other=other)

    def permuted_features(
        self, input_ids: Tensor, order: Tensor, targets: Tensor, segment_ids: Tensor | None = None
    ) -> Tensor:
        """Hidden states (B, M, C) at the positions `targets` (B, M), which do not know the tokens that stand there.

        A token sees those of its rank in `order` (B, T) or lower; a target only lower ones (Yang et al. 2019, 2.3).
        """
        x, _ = self._begin(input_ids, segment_ids, None)
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
            unseen = block(unseen, query, places=targets, content=x)
            x = block(x, content) if n < len(self.blocks) else x  # the last content is read by nobody
        return self.norm(unseen)

    def _begin(self, input_ids: Tensor, segment_ids: Tensor | None, types: Tensor | None) -> tuple[Tensor, Tensor]:
        """The input of the first block and the positions."""
        T = input_ids.shape[1]
        self.check_length(T)
        plain = segment_ids is None
        positions = torch.arange(T, device=input_ids.device) if plain else positions_from_segments(segment_ids)
        return self.embedded(input_ids, positions, types), positions

    def _other(self, types: Tensor | None) -> Tensor | None:
        """Where a key (second) is of another token type than the query (first), (B, T, T), if scores depend on it."""
        if types is None or self.unseen is None:
            return None
        return types[:, :, None] != types[:, None, :]
