"""Attention: the one function that every model calls, and the choice of the backend that computes it.

`reference.py` is the specification in plain tensor operations, `sdpa.py` calls torch's fused kernel, `dense.py` holds all
attention probabilities of short rows at once, `varlen.py` calls torch's kernel for packed rows, `flash/` has Triton kernels
that read masks as rules. All of them take the same mask and score options, and give the same numbers up to rounding:
`tests/kernels` compares each of them with the reference. On a GPU `auto` follows `preference.py`, which a probe sets.
"""

import functools
import importlib.util
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from genai_pl.errors import ConfigError
from genai_pl.kernels.cpu_products import bf16_products_pay
from genai_pl.kernels.dense import dense_attention, dense_unsupported
from genai_pl.kernels.mask import EVERYTHING, AttentionMask
from genai_pl.kernels.preference import preferred
from genai_pl.kernels.reference import reference_attention
from genai_pl.kernels.score_options import PLAIN, ScoreOptions
from genai_pl.kernels.sdpa import sdpa_attention, sdpa_unsupported
from genai_pl.kernels.varlen import varlen_attention, varlen_unsupported

log = logging.getLogger(__name__)

BACKENDS = ("auto", "triton", "sdpa", "varlen", "dense", "reference")
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
        head_dim=max(q.shape[-1], v.shape[-1]),
        dtype=_products_dtype(q),
        lengths=(q.shape[2], k.shape[2]),
        mask=mask,
        options=options,
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
    if selected == "varlen":
        return varlen_attention(q, k, v, mask, options)
    if selected == "dense":
        return dense_attention(q, k, v, mask, options)
    return reference_attention(q, k, v, mask, **options._asdict())


def choose_backend(
    device: torch.device,
    *,
    head_dim: int = 1,
    dtype: torch.dtype = torch.float32,
    lengths: tuple[int, int] = (1, 1),
    mask: AttentionMask = EVERYTHING,
    options: ScoreOptions = PLAIN,
    backend: str = "auto",
) -> tuple[str, str]:
    """The backend that `attention` runs, and the reason for the log; ConfigError if the named one cannot compute this.

    dtype: of products. lengths: queries T and keys S. On a GPU auto takes the first of `preferred()` that can compute this;
    elsewhere torch's fused kernel, or dense attention for short rows of bfloat16 on a CPU that is fast in it, else the
    reference: the order of their speed.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"model.attention={backend} is not a backend: choose one of {', '.join(BACKENDS)}")
    given = {"head_dim": head_dim, "dtype": dtype, "lengths": lengths, "mask": mask, "options": options}
    if backend != "auto":
        if reason := unsupported(backend, device, **given):
            raise ConfigError(f"model.attention={backend} cannot run this model: {reason}; set model.attention=auto")
        return backend, f"model.attention={backend} asks for it"
    if device.type == "cuda":
        return _choose_preferred(device, given)
    if reason := unsupported("sdpa", device, **given):
        return "reference", reason
    if device.type == "cpu" and dtype is torch.bfloat16 and _rows_are_short(*lengths) and bf16_products_pay():
        return "dense", "it is faster for short bf16 rows on this CPU"
    return "sdpa", f"it is the fastest that runs on {device.type}"


def _choose_preferred(device: torch.device, given: dict[str, Any]) -> tuple[str, str]:
    """The first preferred backend that can compute a call, and why: the preference's reason, or what those before it lack."""
    backends, why = preferred()
    lacking = None
    for name in backends:
        reason = unsupported(name, device, **given)
        if reason is None:
            return name, why if lacking is None else f"{backends[0]} cannot: {lacking}"
        lacking = lacking or reason
    return "reference", f"no other can: {lacking or why}"


def unsupported(
    backend: str,
    device: torch.device,
    *,
    head_dim: int,
    dtype: torch.dtype,
    lengths: tuple[int, int],
    mask: AttentionMask,
    options: ScoreOptions,
) -> str | None:
    """The reason why a backend cannot compute this, None where supported."""
    if backend == "triton":
        return triton_unsupported(device, head_dim=head_dim, dtype=dtype)
    if backend == "sdpa":
        return sdpa_unsupported(softcap=options.softcap)
    if backend == "dense":
        return dense_unsupported(softcap=options.softcap)
    if backend == "varlen":
        return varlen_unsupported(device, head_dim=head_dim, dtype=dtype, lengths=lengths, mask=mask, options=options)
    return None


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


def _products_dtype(q: Tensor) -> torch.dtype:
    """The dtype that kernels multiply in: autocast's, where it is on, on a GPU; a CPU's choice goes by the queries alone."""
    kind = q.device.type
    casts = kind == "cuda" and q.dtype != torch.float64 and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if casts else q.dtype


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
