"""The one attention function, shared by every module of every model."""

import functools
import logging

import torch
from torch import Tensor

from genai_pl.errors import ConfigError
from genai_pl.kernels.mask import EVERYTHING, AttentionMask
from genai_pl.kernels.reference import reference_attention
from genai_pl.kernels.sdpa import sdpa_attention, sdpa_lacks

log = logging.getLogger(__name__)

BACKENDS = ("auto", "sdpa", "reference")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: AttentionMask = EVERYTHING,
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    alibi: Tensor | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Attention of q (B, H, T, D) to k and v (B, K, S, D), H a multiple of K: (B, H, T, D).

    scale    of the scores, D**-0.5 if None
    softcap  scores become softcap * tanh(scores / softcap), before any bias (Gemma 2)
    bias     added to the scores, broadcastable to (B, H, T, S), differentiable
    alibi    (H,) slopes: -slope * distance is added to the scores

    A query that sees no key gets zeros and gives zero gradient.
    """
    _check_shapes(q, k, v)
    chosen, reason = choose_backend(q.device, softcap=softcap, backend=backend)
    if backend == "auto" and chosen == "reference" and not torch.compiler.is_compiling():
        _log_once(f"attention: {chosen}, because {reason}")
    if chosen == "sdpa":
        return sdpa_attention(q, k, v, mask, scale=scale, bias=bias, alibi=alibi, dropout_p=dropout_p)
    return reference_attention(q, k, v, mask, scale=scale, bias=bias, alibi=alibi, softcap=softcap, dropout_p=dropout_p)


def choose_backend(device: torch.device, *, softcap: float | None = None, backend: str = "auto") -> tuple[str, str]:
    """The backend that `attention` will run, and why; ConfigError if the one asked for cannot."""
    if backend not in BACKENDS:
        raise ConfigError(f"model.attention={backend} is not a backend: choose one of {', '.join(BACKENDS)}")
    lack = sdpa_lacks(softcap=softcap)
    if backend == "sdpa" and lack:
        raise ConfigError(f"model.attention=sdpa cannot run this model: {lack}; set model.attention=auto")
    if backend != "auto":
        return backend, f"model.attention={backend} asks for it"
    if lack:
        return "reference", lack
    return "sdpa", f"it is the fastest that runs on {device.type}"


@functools.cache
def _log_once(message: str) -> None:
    log.info(message)


def _check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    """ValueError where the shapes do not fit: torch would say so less clearly, or broadcast."""
    (B, H, _, D), (_, K, S, _) = q.shape, k.shape
    if H % K:
        raise ValueError(f"query heads ({H}) must be a multiple of key/value heads ({K})")
    if k.shape != (B, K, S, D) or v.shape[:3] != (B, K, S):
        raise ValueError(f"k {tuple(k.shape)} and v {tuple(v.shape)} do not fit q {tuple(q.shape)}")
