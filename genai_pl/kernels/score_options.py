"""Score options: how attention turns products of queries and keys into scores, the same for every backend."""

from typing import NamedTuple

from torch import Tensor


class ScoreOptions(NamedTuple):
    """The steps from q k^T to the softmax, and the dropout after it, in this order.

    scale      factor of the products; None is D**-0.5 (Vaswani et al. 2017, eq. 1)
    softcap    scores become softcap * tanh(scores / softcap), before any bias (Gemma 2); None: no cap
    bias       added to the scores, broadcastable to (B, H, T, S), differentiable
    alibi      (H,) slopes, constants: -slope * distance is added to the scores (Press et al. 2022)
    sinks      (H,) scores of one more key per head that every query sees and whose value is zero, differentiable: attention
               sinks (Xiao et al. 2024), learned as in gpt-oss (OpenAI 2025); neither scale, softcap nor bias touch them
    dropout_p  probability with which a weight is dropped; the caller sets 0 outside of training

    One tuple travels from a layer through `attend`, windows, hashes and the backends, so that an option is added here and
    where it is computed, and not in every signature in between.

    >>> ScoreOptions(softcap=30.0)._replace(dropout_p=0.1)
    ScoreOptions(scale=None, softcap=30.0, bias=None, alibi=None, sinks=None, dropout_p=0.1)
    """

    scale: float | None = None
    softcap: float | None = None
    bias: Tensor | None = None
    alibi: Tensor | None = None
    sinks: Tensor | None = None
    dropout_p: float = 0.0


PLAIN = ScoreOptions()
