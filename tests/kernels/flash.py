"""Harness: the Triton kernels and the reference on the same numbers."""

import torch
from torch import Tensor

from genai_pl.kernels import AttentionMask, ScoreOptions
from genai_pl.kernels.flash.operator import flash_attention
from genai_pl.kernels.reference import reference_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LEARNED = ("bias", "sinks")  # options that get a gradient


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE)


def inputs(B: int = 2, H: int = 2, K: int = 2, T: int = 40, S: int | None = None, D: int = 16, D_V: int | None = None):
    """q, k, v as a model makes them, (B, T, H, D) turned, and the gradient of the output, in float64."""
    S, D_V = S or T, D_V or D
    shapes = [(B, T, H, D), (B, S, K, D), (B, S, K, D_V), (B, T, H, D_V)]
    return [draw(*shape, seed=n).transpose(1, 2) for n, shape in enumerate(shapes)]


def on_device(mask: AttentionMask) -> AttentionMask:
    fields = {name: value for name, value in vars(mask).items() if not name.startswith("_")}
    return AttentionMask(**{name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in fields.items()})


def exact_lse(q: Tensor, k: Tensor, mask: AttentionMask, options: dict) -> Tensor:
    """log-sum-exp of the visible scores, written out."""
    T, S = q.shape[2], k.shape[2]
    scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(-2, -1)
    scores = scores * options.get("scale", q.shape[-1] ** -0.5)
    if options.get("softcap"):
        scores = options["softcap"] * (scores / options["softcap"]).tanh()
    if "bias" in options:
        scores = scores + options["bias"]
    if "alibi" in options:
        distance = (torch.arange(S - T, S)[:, None] - torch.arange(S)).abs().to(q.device)
        scores = scores - options["alibi"].view(-1, 1, 1) * distance
    scores = scores.masked_fill(~mask.dense(T, S, q.device), float("-inf"))
    if "sinks" in options:
        scores = torch.cat([scores, options["sinks"].view(-1, 1, 1).expand(*scores.shape[:-1], 1)], dim=-1)
    return scores.logsumexp(-1)


def results(attention, tensors: list[Tensor], options: dict, dtype: torch.dtype) -> list[Tensor]:
    """The results of `attention`, and the gradients of q, k, v, bias and sinks, for inputs rounded to dtype."""
    leaves = [x.to(dtype).detach().requires_grad_() for x in tensors[:3]]
    learned = {name: options[name].to(dtype).detach().requires_grad_() for name in LEARNED if name in options}
    options, leaves = options | learned, [*leaves, *learned.values()]
    o, *lse = attention(*leaves[:3], **options)
    return [o, *lse, *torch.autograd.grad(o, leaves, tensors[3].to(o.dtype))]


def ours_and_exact(mask: AttentionMask, tensors: list[Tensor], options: dict, dtype: torch.dtype = torch.float32):
    """(o, lse, dq, dk, dv, d_bias, d_sinks) of the kernels in dtype and of the reference in float64, as far as there are any."""
    mask = on_device(mask)
    options = {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in options.items()}
    tensors = [x.to(dtype).double() for x in tensors]
    options |= {name: options[name].to(dtype).double() for name in LEARNED if name in options}

    def exact(q: Tensor, k: Tensor, v: Tensor, **options) -> tuple[Tensor, Tensor]:
        return reference_attention(q, k, v, mask, **options), exact_lse(q, k, mask, options)

    ours = results(lambda q, k, v, **o: flash_attention(q, k, v, mask, ScoreOptions(**o)), tensors, options, dtype)
    return ours, results(exact, tensors, options, torch.float64)


def relative_error(ours: Tensor, exact: Tensor) -> float:
    """The largest difference over the largest entry, or over 0.1; both must be -inf in the same places."""
    assert torch.equal(ours.isinf(), exact.isinf())
    ours, exact = (x.detach().double().nan_to_num(neginf=0.0) for x in (ours, exact))
    return ((ours - exact).abs().max() / exact.abs().max().clamp(min=0.1)).item()


def check(mask: AttentionMask, tensors: list[Tensor], limit: float = 1e-5, dtype=torch.float32, **options) -> None:
    """The kernels equal the reference, forward and backward, up to `limit`."""
    ours, exact = ours_and_exact(mask, tensors, options, dtype)
    names = ("o", "lse", "dq", "dk", "dv", *(f"d_{name}" for name in LEARNED if name in options))
    errors = {name: relative_error(a, b) for name, a, b in zip(names, ours, exact, strict=True)}
    assert all(error <= limit for error in errors.values()), errors
