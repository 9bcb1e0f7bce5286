"""What a model costs: parameters, arithmetic and memory, from its configuration alone."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from genai_pl.kernels.projection import CHUNK_BYTES
from genai_pl.names import Activation, Head, Norm, Shape
from genai_pl.specs import ModelConfig


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
    inside = [*model.blocks, model.transform, model.embed_proj]
    return sum(p.numel() for part in inside for p in part.parameters() if p.dim() >= 2)  # a shared block counts again


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one training step on one device."""

    weights: int
    gradients: int
    optimizer: int
    activations: int  # what the backward pass of the layers needs
    loss: int  # a chunk of logits, and the gradients that the loss holds until the backward pass

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.loss


def memory_estimate(
    model: nn.Module, config: ModelConfig, *, tokens: int, weight_bytes: int, activation_bytes: int, moments: float
) -> MemoryEstimate:
    """The bytes of a step over `tokens` tokens, with `moments` float32 numbers of optimizer state per trained weight.

    Holds for fused attention without a mask: the reference backend keeps T^2 scores, and a packed row a (T, T) mask.
    """
    n, trained = n_parameters(model), n_parameters(model, trainable=True)
    per_token = _saved_numbers(config) * activation_bytes + _saved_dropout_bytes(config)
    chunk = min(tokens * config.vocab_size * 4, CHUNK_BYTES)
    return MemoryEstimate(
        weights=n * weight_bytes,
        gradients=trained * weight_bytes,
        optimizer=int(trained * 4 * moments),
        activations=tokens * per_token,
        # logits and their copy in the dtype of the product; the gradients of the head and of the hidden states
        loss=2 * chunk + config.n_embd * (config.vocab_size * 4 + tokens * activation_bytes),
    )


def _saved_numbers(config: ModelConfig) -> int:
    """Numbers that autograd keeps per token, operation by operation (after Korthikanti et al. 2022, section 4.1)."""
    C, F = config.n_embd, config.intermediate_size
    q, kv = config.n_head * config.head_dim, config.n_kv_head * config.head_dim
    # LayerNorm keeps its input, RMSNorm also x / rms(x): CUDA fuses it and does not, so there a Llama's estimate is a
    # tenth too high, which errs on the side that still fits
    kept_by_norm = 2 if config.norm is Norm.rmsnorm else 1
    # a norm's output is the input of the next product, and q, k, v (or gate and up) share theirs
    norm = (kept_by_norm + 1) * C
    # attention keeps q, k, v as they enter it (rotation makes new ones, and keeps none), and its output, which is
    # the input of o_proj; QK-norm keeps what came before it
    attention = 2 * q + 2 * kv + (kept_by_norm * (q + kv) if config.qk_norm else 0)
    # ungated: the activation's input and its output, the input of down_proj; gated: also `up` and the product
    mlp = F * (4 if config.gated_mlp else 2)
    if config.activation is Activation.relu:
        mlp -= F  # its derivative is read from its output
    # residual sums are the inputs of norms, dropped ones keep nothing but their mask; one norm more at the end
    return config.n_layer * (2 * norm + attention + mlp) + norm


def _saved_dropout_bytes(config: ModelConfig) -> int:
    """Masks of one byte: after the embedding, and before each of the two residual sums of a layer."""
    return config.n_embd * (2 * config.n_layer + 1) if config.dropout else 0
