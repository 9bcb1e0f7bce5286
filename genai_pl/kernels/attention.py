"""Attention: the one function that every model calls, and the choice of the backend that computes it.

`reference.py` is the specification in plain tensor operations, `sdpa.py` calls torch's fused kernel, `dense.py` holds all
attention probabilities of short rows at once, `flash/` has Triton kernels that read masks as rules. All of them take the same
mask and score options, and give the same numbers up to rounding: `tests/kernels` compares each of them with the reference.
"""

import functools
import importlib.util
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from genai_pl.errors import ConfigError
from genai_pl.kernels.cpu_products import bf16_products_pay
from genai_pl.kernels.dense import dense_attention, dense_unsupported
from genai_pl.kernels.mask import EVERYTHING, AttentionMask
from genai_pl.kernels.reference import reference_attention
from genai_pl.kernels.score_options import PLAIN, ScoreOptions
from genai_pl.kernels.sdpa import sdpa_attention, sdpa_unsupported

log = logging.getLogger(__name__)

BACKENDS = ("auto", "triton", "sdpa", "dense", "reference")
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TRITON_HEAD_DIM = 256
# for which auto takes dense attention in bf16 on a CPU: fewer queries than this, or no more keys than that
DENSE_QUERIES, DENSE_KEYS = 32, 512
HAS_TRITON = importlib.util.find_spec("triton") is not None  # at import: torch.compile cannot trace the look-up


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: AttentionMask = EVERYTHING,
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    alibi: Tensor | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """The values mixed by attention, (B, H, T, D): softmax(q k^T * scale + ...) v of q (B, H, T, D), k and v (B, K, S, D).

    H is a multiple of K: query heads h * H / K and following share key head h (grouped queries, Ainslie et al. 2023). The
    S keys end where the T queries end, so that one new query with a cache sees all keys under a causal mask. The options
    are those of `ScoreOptions`; backend is a name of BACKENDS. A query that sees no key gets zeros and gives zero
    gradient. ValueError for shapes that do not fit, ConfigError for a backend that cannot compute this.

    >>> x = torch.ones(1, 2, 3, 4)
    >>> attention(x, x, x, AttentionMask(causal=True)).shape
    torch.Size([1, 2, 3, 4])
    """
    options = ScoreOptions(scale=scale, softcap=softcap, bias=bias, alibi=alibi, sinks=sinks, dropout_p=dropout_p)
    return attention_with(q, k, v, mask, options, backend=backend)


def attention_with(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: AttentionMask = EVERYTHING,
    options: ScoreOptions = PLAIN,
    *,
    backend: str = "auto",
) -> Tensor:
    """`attention` with its score options in one tuple, as the layers of a model hold them."""
    _check_shapes(q, k, v, options.sinks)
    selected, reason = choose_backend(
        q.device,
        softcap=options.softcap,
        head_dim=max(q.shape[-1], v.shape[-1]),
        dtype=q.dtype,
        lengths=(q.shape[2], k.shape[2]),
        backend=backend,
    )
    # a fallback is slow and memory-hungry: the log tells why, once a process
    if backend == "auto" and selected == "reference" and not torch.compiler.is_compiling():
        log_once(f"attention: {selected}, because {reason}")
    if selected == "triton":
        from genai_pl.kernels.flash.operator import flash_attention  # imports Triton, which a CPU run need not have

        return flash_attention(q, k, v, mask, options)[0]
    if selected == "sdpa":
        return sdpa_attention(q, k, v, mask, options)
    if selected == "dense":
        return dense_attention(q, k, v, mask, options)
    return reference_attention(q, k, v, mask, **options._asdict())


def choose_backend(
    device: torch.device,
    *,
    softcap: float | None = None,
    head_dim: int = 1,
    dtype: torch.dtype = torch.float32,
    lengths: tuple[int, int] = (1, 1),
    backend: str = "auto",
) -> tuple[str, str]:
    """The backend that `attention` runs, and the reason for the log; ConfigError if the named one cannot compute this.

    lengths: queries T and keys S. auto takes Triton on a GPU, else torch's fused kernel, or dense attention for short rows of
    bfloat16 on a CPU that is fast in it, else the reference: the order of their speed.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"model.attention={backend} is not a backend: choose one of {', '.join(BACKENDS)}")
    unsupported = {
        "triton": triton_unsupported(device, head_dim=head_dim, dtype=dtype),
        "sdpa": sdpa_unsupported(softcap=softcap),
        "dense": dense_unsupported(softcap=softcap),
    }
    if backend != "auto":
        if unsupported.get(backend):
            raise ConfigError(
                f"model.attention={backend} cannot run this model: {unsupported[backend]}; set model.attention=auto"
            )
        return backend, f"model.attention={backend} asks for it"
    if device.type == "cuda" and unsupported["triton"] is None:
        return "triton", "its kernels run every mask and option on a GPU"
    if unsupported["sdpa"]:
        return "reference", unsupported["sdpa"]
    if device.type == "cpu" and dtype is torch.bfloat16 and _rows_are_short(*lengths) and bf16_products_pay():
        return "dense", "it is faster for short bf16 rows on this CPU"
    slower = f", where {unsupported['triton']}" if device.type == "cuda" else ""
    return "sdpa", f"it is the fastest that runs on {device.type}{slower}"


def triton_unsupported(device: torch.device, *, head_dim: int, dtype: torch.dtype) -> str | None:
    """The reason why the Triton kernels cannot compute this, None where supported; ROCm calls its devices cuda too."""
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


_fused_only: ContextVar[bool] = ContextVar("fused_only", default=False)


@contextmanager
def fused_only() -> Iterator[None]:
    """Context in which auto never takes dense attention: for code that counts on a CPU what another device would do."""
    token = _fused_only.set(True)
    try:
        yield
    finally:
        _fused_only.reset(token)


def _rows_are_short(T: int, S: int) -> bool:
    """True for T queries and S keys that dense attention suits: short rows, and the few queries of a decoding step.

    For one query torch's fused kernel takes 2 to 20 times as long in bf16 (64 to 1,024 keys). Under torch.compile, where
    lengths may be symbols, False.
    """
    if torch.compiler.is_compiling() or _fused_only.get():
        return False
    return T < DENSE_QUERIES or S <= DENSE_KEYS


@functools.cache
def log_once(message: str) -> None:
    """Log a message the first time it occurs in this process."""
    log.info(message)


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> None:
    """ValueError where the shapes do not fit: torch's own message is less clear, or torch broadcasts without one."""
    (B, H, _, D), (_, K, S, _) = q.shape, k.shape
    if H % K:
        raise ValueError(f"query heads ({H}) must be a multiple of key/value heads ({K})")
    if k.shape != (B, K, S, D) or v.shape[:3] != (B, K, S):
        raise ValueError(f"k {tuple(k.shape)} and v {tuple(v.shape)} do not fit q {tuple(q.shape)}")
    if sinks is not None and sinks.shape != (H,):
        raise ValueError(f"sinks {tuple(sinks.shape)} do not fit {H} query heads")
