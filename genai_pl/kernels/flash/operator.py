"""Flash attention operator: one differentiable torch operator, known to torch.compile, checkpointing, autocast and FLOP counters.

Operators take tensors and plain numbers, so a mask travels as tables of integers and a `Case` of numbers. Triton is imported
when the first kernel runs.
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from genai_pl.kernels.flash.mask_tables import mask_tables
from genai_pl.kernels.mask import AttentionMask
from genai_pl.kernels.score_options import PLAIN, ScoreOptions

# the schema: optional tensors, numbers
EXTRAS = "Tensor? bias, Tensor? alibi, Tensor? queries, Tensor? keys, Tensor? seed, Tensor? sinks"
CASE = "bool causal, int window, bool prefix, bool segments, int order, float scale, float softcap, float dropout_p"
CASE += ", bool global_prefix"
N_EXTRAS = 6


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: AttentionMask,
    options: ScoreOptions = PLAIN,
) -> tuple[Tensor, Tensor]:
    """`reference_attention`, (B, H, T, D), and the log-sum-exp of the scores and sinks in float32, (B, H, T).

    Both are differentiable in q, k, v, bias and sinks, so that parts of attention over different keys can be merged. A query
    that sees no key has a log-sum-exp of -inf, or its head's sink. ValueError for slopes that need a gradient.
    """
    (B, H, T, D), S = q.shape, k.shape[2]
    if options.alibi is not None and options.alibi.requires_grad:
        raise ValueError("alibi slopes are constants here: backend triton gives them no gradient")
    if 0 in (B, T, S):
        return q.new_zeros(B, H, T, v.shape[-1]), q.new_full((B, H, T), float("-inf"), dtype=torch.float32)
    kind = q.device.type
    if torch.is_autocast_enabled(kind):  # slopes and bias stay exact: they are read once
        q, k, v = (x.to(torch.get_autocast_dtype(kind)) for x in (q, k, v))
    # the mask as tables and numbers, which an operator can take
    queries, keys = mask_tables(mask, T, S, q.device)
    seed = torch.randint(2**62, (1,), device=q.device) if options.dropout_p > 0.0 else None
    case = (
        mask.causal,
        mask.window or 0,
        mask.prefix is not None,
        mask.segments is not None,
        0 if mask.order is None else 1 + mask.strict,
        D**-0.5 if options.scale is None else options.scale,
        options.softcap or 0.0,
        options.dropout_p,
        mask.global_prefix is not None,
    )
    extras = (options.bias, options.alibi, queries, keys, seed, options.sinks)
    return torch.ops.genai_pl.flash_forward(q, k, v, *extras, *case)


def _forward(q: Tensor, k: Tensor, v: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    """The operator's kernel: output and log-sum-exp; rest: extras and case in the order of the schema."""
    from genai_pl.kernels.flash.common import Extras
    from genai_pl.kernels.flash.launch import run_forward
    from genai_pl.kernels.flash.problem import Case

    return run_forward(q, k, v, Extras(*rest[:N_EXTRAS]), Case(*rest[N_EXTRAS:]))


def _backward(
    d_o: Tensor, d_lse: Tensor | None, o: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: object
) -> tuple[Tensor, ...]:
    """The backward operator's kernel: gradients of q, k, v, bias and sinks (an empty tensor where none is needed)."""
    from genai_pl.kernels.flash.common import Extras
    from genai_pl.kernels.flash.launch import run_backward
    from genai_pl.kernels.flash.problem import Case

    *rest, need_bias = rest
    extras, case = Extras(*rest[:N_EXTRAS]), Case(*rest[N_EXTRAS:])
    dq, dk, dv, *optional = run_backward(q, k, v, o, lse, d_o, d_lse, extras, case, need_bias=need_bias)
    return dq, dk, dv, *(q.new_empty(0) if x is None else x for x in optional)  # an operator returns no None


def _heads_aside(x: Tensor, width: int | None = None) -> Tensor:
    """An empty (B, H, T, width) in the kernels' layout (B, T, H, width), so that joining heads needs no copy."""
    B, H, T, D = x.shape
    return x.new_empty(B, T, H, D if width is None else width).transpose(1, 2)


def _forward_shapes(q: Tensor, k: Tensor, v: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    """Results without numbers, for tracing."""
    return _heads_aside(q, v.shape[-1]), q.new_empty(q.shape[:3], dtype=torch.float32)


def _backward_shapes(
    d_o: Tensor, d_lse: Tensor | None, o: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: object
) -> tuple[Tensor, ...]:
    """Gradients without numbers, for tracing."""
    bias, sinks, need_bias = rest[0], rest[N_EXTRAS - 1], rest[-1]
    d_bias = bias.new_empty(bias.shape) if need_bias else q.new_empty(0)
    d_sinks = q.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)
    return _heads_aside(q), _heads_aside(k), _heads_aside(v), d_bias, d_sinks


def _save(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    """Keep what backward needs: inputs, output and log-sum-exp, from which it computes the weights again."""
    tensors = inputs[: 3 + N_EXTRAS]
    ctx.save_for_backward(*output, *tensors)
    ctx.case = inputs[3 + N_EXTRAS :]
    ctx.set_materialize_grads(False)


def _gradients(ctx: torch.autograd.function.FunctionCtx, d_o: Tensor | None, d_lse: Tensor | None) -> tuple:
    """Gradients of every input, None for those that have none."""
    o, lse, q, k, v, *extras = ctx.saved_tensors
    d_o = torch.zeros_like(o) if d_o is None else d_o
    need_bias = extras[0] is not None and ctx.needs_input_grad[3]
    dq, dk, dv, d_bias, d_sinks = torch.ops.genai_pl.flash_backward(
        d_o, d_lse, o, lse, q, k, v, *extras, *ctx.case, need_bias
    )
    d_extras = (d_bias if need_bias else None, *(None,) * (N_EXTRAS - 2), None if extras[-1] is None else d_sinks)
    return dq, dk, dv, *d_extras, *(None,) * len(ctx.case)


def _register() -> None:
    """Define both operators once: schema, kernels, shapes for tracing, gradient and FLOPs."""
    arguments = f"Tensor q, Tensor k, Tensor v, {EXTRAS}, {CASE}"
    torch.library.define("genai_pl::flash_forward", f"({arguments}) -> (Tensor, Tensor)")
    torch.library.define(
        "genai_pl::flash_backward",
        f"(Tensor d_o, Tensor? d_lse, Tensor o, Tensor lse, {arguments}, bool need_bias)"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    )
    for name, run, shapes in (("forward", _forward, _forward_shapes), ("backward", _backward, _backward_shapes)):
        for device in ("CUDA", "CPU"):
            torch.library.impl(f"genai_pl::flash_{name}", device, run)
        torch.library.register_fake(f"genai_pl::flash_{name}", shapes)
    torch.library.register_autograd("genai_pl::flash_forward", _gradients, setup_context=_save)
    register_flop_formula(torch.ops.genai_pl.flash_forward)(_forward_flops)
    register_flop_formula(torch.ops.genai_pl.flash_backward)(_backward_flops)


def _forward_flops(q: torch.Size, k: torch.Size, v: torch.Size, *_: object, **__: object) -> int:
    """FLOPs of two products, as torch counts its own attention: hidden keys count too."""
    B, H, T, D = q
    return 2 * B * H * T * k[2] * (D + v[3])


def _backward_flops(d_o: object, d_lse: object, o: object, lse: object, q, k, v, *_: object, **__: object) -> int:
    """FLOPs of five products; the kernels do seven, rather than share sums by atomics."""
    B, H, T, D = q
    return 2 * B * H * T * k[2] * (3 * D + 2 * v[3])


_register()
