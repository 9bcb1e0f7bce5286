"""The one attention function, shared by every module of every model."""

import functools
import importlib.util
import logging
import os

import torch
from torch import Tensor

from genai_pl.errors import ConfigError
from genai_pl.kernels.mask import EVERYTHING, AttentionMask
from genai_pl.kernels.reference import reference_attention
from genai_pl.kernels.sdpa import sdpa_attention, sdpa_lacks

log = logging.getLogger(__name__)

BACKENDS = ("auto", "triton", "sdpa", "reference")
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TRITON_HEAD_DIM = 256
HAS_TRITON = importlib.util.find_spec("triton") is not None  # asked once: torch.compile cannot trace the question


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
    selected, reason = choose_backend(
        q.device, softcap=softcap, head_dim=max(q.shape[-1], v.shape[-1]), dtype=q.dtype, backend=backend
    )
    if backend == "auto" and selected == "reference" and not torch.compiler.is_compiling():
        log_once(f"attention: {selected}, because {reason}")
    options = {"scale": scale, "bias": bias, "alibi": alibi, "dropout_p": dropout_p}
    if selected == "triton":
        from genai_pl.kernels.flash.operator import flash_attention

        return flash_attention(q, k, v, mask, softcap=softcap, **options)[0]
    if selected == "sdpa":
        return sdpa_attention(q, k, v, mask, **options)
    return reference_attention(q, k, v, mask, softcap=softcap, **options)


def choose_backend(
    device: torch.device,
    *,
    softcap: float | None = None,
    head_dim: int = 1,
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
) -> tuple[str, str]:
    """The backend that `attention` will run, and why; ConfigError if the one asked for cannot."""
    if backend not in BACKENDS:
        raise ConfigError(f"model.attention={backend} is not a backend: choose one of {', '.join(BACKENDS)}")
    lacks = {"triton": triton_lacks(device, head_dim=head_dim, dtype=dtype), "sdpa": sdpa_lacks(softcap=softcap)}
    if backend != "auto":
        if lacks.get(backend):
            raise ConfigError(
                f"model.attention={backend} cannot run this model: {lacks[backend]}; set model.attention=auto"
            )
        return backend, f"model.attention={backend} asks for it"
    if device.type == "cuda" and lacks["triton"] is None:
        return "triton", "its kernels run every mask and option on a GPU"
    if lacks["sdpa"]:
        return "reference", lacks["sdpa"]
    slower = f", where {lacks['triton']}" if device.type == "cuda" else ""
    return "sdpa", f"it is the fastest that runs on {device.type}{slower}"


def triton_lacks(device: torch.device, *, head_dim: int, dtype: torch.dtype) -> str | None:
    """Why the Triton kernels cannot do this, or None where they can; ROCm calls its devices cuda too."""
    if not HAS_TRITON:
        return "triton is not installed (pip install triton)"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return (
            f"triton needs a GPU, not {device.type}, unless TRITON_INTERPRET=1 is set from the start (slow: for tests)"
        )
    if head_dim > TRITON_HEAD_DIM:
        return f"its heads may have {TRITON_HEAD_DIM} dimensions, not {head_dim}"
    if dtype not in TRITON_DTYPES:
        return f"triton has no kernels for {dtype}"
    return None


@functools.cache
def log_once(message: str) -> None:
    log.info(message)


def _check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    """ValueError where the shapes do not fit: torch would say so less clearly, or broadcast."""
    (B, H, _, D), (_, K, S, _) = q.shape, k.shape
    if H % K:
        raise ValueError(f"query heads ({H}) must be a multiple of key/value heads ({K})")
    if k.shape != (B, K, S, D) or v.shape[:3] != (B, K, S):
        raise ValueError(f"k {tuple(k.shape)} and v {tuple(v.shape)} do not fit q {tuple(q.shape)}")
