"""Model cost: parameters, and training FLOPs per token from the configuration alone.

A training step's model FLOPs utilization is `FlopRates.total(...)` over the step's time and the device's peak. The count
is the paper's, not the machine's: recomputed activations and masked blocks of attention do not change it, so that runs
with different settings compare.
"""

from typing import NamedTuple

from torch import nn

from genai_pl.config.enums import Shape
from genai_pl.config.model import ModelConfig
from genai_pl.models.experts import MoE


def n_parameters(model: nn.Module, *, trainable: bool = False) -> int:
    """The number of parameters, or of trainable ones; a tied weight counts once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable)


def n_active_parameters(model: nn.Module) -> int:
    """The number of parameters that one token passes: of experts, experts_per_token out of n_experts."""
    return n_parameters(model) - sum(
        _idle(p.numel(), moe) for moe in _mixtures(model) for p in moe.experts.parameters()
    )


class FlopRates(NamedTuple):
    """Training FLOPs, forward and backward, of one token.

    read       that passes through an encoder, or through a decoder alone
    written    that passes through the decoder of an encoder-decoder
    predicted  that the head turns into logits: a masked LM predicts 15 % of its tokens
    """

    read: float
    written: float
    predicted: float

    def total(self, *, read: float, predicted: float, written: float = 0.0) -> float:
        """FLOPs of these numbers of tokens."""
        return self.read * read + self.written * written + self.predicted * predicted


def flop_rates(model: nn.Module, config: ModelConfig, seq_len: int) -> FlopRates:
    """6 N + 12 L H D T per token, split by the part of the model that computes it (Chowdhery et al. 2022, appendix B).

    N: parameters of matrices that multiply a token (of the experts only those that it is sent to), 2 FLOPs each forward
    and 4 backward. The second term is attention: two products of T keys. T is the whole row of seq_len tokens, as in the
    paper, though a causal kernel skips half of it; or the window, where there is one.
    """
    head = 0 if not config.head.predicts_tokens else 6.0 * config.vocab_size * config.embedding_size
    span = min(seq_len, config.window or seq_len)
    scores = 12.0 * config.n_head * config.head_dim * span  # of one attention
    if config.shape is not Shape.encoder_decoder:
        return FlopRates(6.0 * _multiplied(model) + scores * config.n_layer, 0.0, head)
    encoder = 6.0 * _multiplied(model.encoder) + scores * config.n_layer
    decoder = 6.0 * _multiplied(model.decoder) + 2 * scores * config.n_decoder_layer
    return FlopRates(encoder, decoder, head)


def flops_per_token(model: nn.Module, config: ModelConfig, seq_len: int) -> float:
    """Training FLOPs of a token that every part of the model processes."""
    return flop_rates(model, config, seq_len).total(read=1, written=1, predicted=1)


def _multiplied(model: nn.Module) -> int:
    """Parameters of the matrices that multiply each token, without the head's; a shared block counts again."""
    return sum(multiplied(part) for part in (*model.blocks, model.transform, model.embed_proj))


def multiplied(part: nn.Module, *, frozen: bool = False) -> int:
    """Parameters of the matrices in a part of a model that multiply one token; with frozen, of those without a gradient."""
    counted = {p: p.numel() for p in part.parameters() if p.dim() >= 2 and not (frozen and p.requires_grad)}
    for moe in _mixtures(part):
        for name, p in moe.experts.named_parameters():
            if p in counted:
                counted[p] = 0 if name.endswith("bias") else counted[p] - _idle(counted[p], moe)
    return sum(counted.values())


def _idle(n: int, moe: MoE) -> int:
    """How many of n parameters of all experts a token does not pass."""
    return n // moe.n_experts * (moe.n_experts - moe.k)


def _mixtures(model: nn.Module) -> list[MoE]:
    return [module for module in model.modules() if isinstance(module, MoE)]
