"""What a model costs: parameters and arithmetic, from its configuration alone."""

from typing import NamedTuple

from torch import nn

from genai_pl.config.enums import Head, Shape
from genai_pl.config.model import ModelConfig


def n_parameters(model: nn.Module, *, trainable: bool = False) -> int:
    """How many numbers the model holds, or learns; a tied weight counts once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable)


class FlopRates(NamedTuple):
    """Training FLOPs, forward and backward, of each token of a kind."""

    read: float  # of an encoder or decoder
    written: float  # of the decoder beside an encoder
    predicted: float  # by the head

    def total(self, *, read: float, predicted: float, written: float = 0.0) -> float:
        """FLOPs of so many tokens of each kind."""
        return self.read * read + self.written * written + self.predicted * predicted


def flop_rates(model: nn.Module, config: ModelConfig, seq_len: int) -> FlopRates:
    """6 N + 12 L H D T, split by the part of the model that does it (Chowdhery et al. 2022, appendix B).

    N counts matrices that multiply. T is the keys that a query is compared with: all of the row, as in the paper,
    though a causal kernel skips half of them; the window where there is one.
    """
    head = 0 if config.head in (Head.none, Head.score) else 6.0 * config.vocab_size * config.embedding_size
    span = min(seq_len, config.window or seq_len)
    scores = 12.0 * config.n_head * config.head_dim * span  # of one attention
    if config.shape is not Shape.encoder_decoder:
        return FlopRates(6.0 * _multiplied(model) + scores * config.n_layer, 0.0, head)
    encoder = 6.0 * _multiplied(model.encoder) + scores * config.n_layer
    decoder = 6.0 * _multiplied(model.decoder) + 2 * scores * config.n_decoder_layer
    return FlopRates(encoder, decoder, head)


def flops_per_token(model: nn.Module, config: ModelConfig, seq_len: int) -> float:
    """Training FLOPs of a token that every part of the model works on."""
    return flop_rates(model, config, seq_len).total(read=1, written=1, predicted=1)


def _multiplied(model: nn.Module) -> int:
    """Numbers in the matrices that multiply each token, the head's left out."""
    parts = [*model.blocks, model.transform, model.embed_proj]
    return sum(p.numel() for part in parts for p in part.parameters() if p.dim() >= 2)  # a shared block counts again
