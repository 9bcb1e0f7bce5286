"""Mixture of experts: a router sends each token to k of E MLPs, so that parameters grow without FLOPs (Shazeer et al. 2017).

No token is dropped: rows are sorted by expert once, and each expert multiplies as many as it was given. What training
needs beside the output (auxiliary losses, loads) is handed to the `collecting` context around a pass, if there is one.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genai_pl.config.enums import Router as RouterKind
from genai_pl.config.model import ModelConfig
from genai_pl.distributed.dtensor import local_shard
from genai_pl.kernels.uncompiled import uncompiled
from genai_pl.models.layers import MLP, GatedMLP, build_activation, build_glu


class Dispatch(NamedTuple):
    """The order of N tokens' N k rows by expert, stable, so that equal inputs give equal sums.

    order, inverse  (N k,), sorted row -> row of the token-major order, and back
    experts         (N k,), the expert of each sorted row, ascending
    ends            (E,) int32, the row behind each expert's last
    k               experts of a token
    tokens_per_row  T of the batch (B, T) that the tokens came from
    """

    order: Tensor
    inverse: Tensor
    experts: Tensor
    ends: Tensor
    k: int
    tokens_per_row: int

    @property
    def batch_rows(self) -> Tensor:
        """The row of the batch that each sorted row belongs to, (N k,)."""
        return self.order // (self.k * self.tokens_per_row)


class LayerRouting(NamedTuple):
    """What one mixture layer did in one forward pass, padding left out.

    layer: the module. load: (E,) tokens by expert. balance_loss, router_z_loss: means over the tokens of the pass.
    """

    layer: "MoE"
    load: Tensor
    balance_loss: Tensor
    router_z_loss: Tensor


_collector: ContextVar[list[LayerRouting] | None] = ContextVar("routing", default=None)


@contextmanager
def collecting() -> Iterator[list[LayerRouting]]:
    """A list that every mixture layer in training mode adds to in the forward passes inside this context."""
    found: list[LayerRouting] = []
    token = _collector.set(found)
    try:
        yield found
    finally:
        _collector.reset(token)


@uncompiled("it adds to a list of the caller")
def _collect(routing: LayerRouting) -> None:
    """Add to the list of the innermost `collecting`; recomputation in a backward pass is outside, and adds nothing."""
    found = _collector.get()
    if found is not None:
        found.append(routing)


class Router(nn.Module):
    """The experts of each token and their weights: softmax or sigmoid scores of x W^T in float32, and the k highest.

    config: kind of scores, k, whether the logits have a `bias` (E,), and whether the k weights are divided by their sum,
    which makes of a softmax over all experts the softmax over the k. A balance bias (E,) is added for the choice only
    (DeepSeek-V3, arXiv 2412.19437, eq. 16). Float32, as a rounded score sends a token elsewhere (Fedus et al. 2021).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.n_experts, config.n_embd))
        self.bias = nn.Parameter(torch.empty(config.n_experts)) if config.router_bias else None
        self.k, self.normalizes, self.scale = config.experts_per_token, config.normalize_top_k, config.router_scale
        self.is_sigmoid = config.router is RouterKind.sigmoid

    def forward(self, x: Tensor, balance_bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Weights (N, k), experts (N, k), scores (N, E) and logits (N, E) of tokens (N, C)."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.to(dtype)
            logits = F.linear(x.to(dtype), self.weight.to(dtype), bias)
            scores = logits.sigmoid() if self.is_sigmoid else logits.softmax(-1)
            if balance_bias is None:
                weights, experts = scores.topk(self.k)
            else:
                experts = (scores + balance_bias.to(dtype)).topk(self.k).indices
                weights = scores.gather(1, experts)
            if self.normalizes:
                weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)  # sigmoids may all be 0
        return weights * self.scale, experts, scores, logits


class ExpertLinear(nn.Module):
    """x W_e^T + b_e for rows sorted by expert, (N k, in) -> (N k, out), with weight (E, out, in) and bias (E, out) or None.

    Under expert parallelism a rank holds some of the E, and gets their rows.
    """

    def __init__(self, n_experts: int, in_features: int, out_features: int, *, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(n_experts, out_features, in_features))
        self.bias = nn.Parameter(torch.empty(n_experts, out_features)) if bias else None

    def forward(self, x: Tensor, dispatch: Dispatch) -> Tensor:
        # late: registering an operator imports triton, which only mixtures need to wait for
        from genai_pl.kernels.grouped_linear import grouped_linear, grouped_rows

        y = grouped_linear(x, local_shard(self.weight), dispatch.ends)
        return y if self.bias is None else y + grouped_rows(local_shard(self.bias), dispatch.experts).to(y.dtype)


class Experts(nn.Module):
    """E MLPs of `expert_size` hidden channels, gated as the dense one would be, on rows sorted by expert."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        E, C, F_, bias = config.n_experts, config.n_embd, config.expert_size, config.bias
        self.gate_proj = ExpertLinear(E, C, F_, bias=bias) if config.gated_mlp else None
        self.up_proj = ExpertLinear(E, C, F_, bias=bias)
        self.down_proj = ExpertLinear(E, F_, C, bias=bias)
        self.activation = None if config.gated_mlp else build_activation(config.activation)
        self.glu = build_glu(config) if config.gated_mlp else None

    def forward(self, x: Tensor, dispatch: Dispatch) -> Tensor:
        """The MLP of its expert for each row, (N k, C) -> (N k, C)."""
        up = self.up_proj(x, dispatch)
        hidden = self.activation(up) if self.glu is None else self.glu(self.gate_proj(x, dispatch), up)
        return self.down_proj(hidden, dispatch)


class MoE(nn.Module):
    """sum_k w_k MLP_k(x) over the k experts of each token, and MLP_shared(x), (B, T, C) -> (B, T, C).

    config: see `ModelConfig.n_experts` and the fields after it. `shared` is one MLP of n_shared_experts times expert_size
    (Dai et al. 2024, DeepSeekMoE), `balance_bias` (E,) a buffer that training moves after each step.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_experts, self.k = config.n_experts, config.experts_per_token
        self.router, self.experts = Router(config), Experts(config)
        shared = GatedMLP if config.gated_mlp else MLP
        width = config.n_shared_experts * config.expert_size
        self.shared = shared(config, width) if config.n_shared_experts else None
        self.register_buffer("balance_bias", torch.zeros(config.n_experts) if config.balance_bias else None)

    def forward(self, x: Tensor, real: Tensor | None = None) -> Tensor:
        """real (B, T): False for padding, which is routed as any token but does not count; None: nothing is padding."""
        flat = x.reshape(-1, x.shape[-1])  # (N, C)
        weights, experts, scores, logits = self.router(flat, self.balance_bias)
        if self.training:  # whether or not it is collected: a recomputed pass must do what the first one did
            counted = None if real is None else real.reshape(-1)
            _collect(LayerRouting(self, *statistics(experts, scores, logits, counted)))
        dispatch = sort_by_expert(experts, self.n_experts, tokens_per_row=x.shape[-2])
        y = self.experts(SortRows.apply(flat, dispatch.order, dispatch.inverse, dispatch.k), dispatch)  # (N k, C)
        y = SortRows.apply(y, dispatch.inverse, dispatch.order, 1).view(*experts.shape, -1)  # (N, k, C), by token again
        y = (y * weights[..., None].to(y.dtype)).sum(1)
        if self.shared is not None:
            y = y + self.shared(flat)
        return y.view(x.shape)


def sort_by_expert(experts: Tensor, n_experts: int, *, tokens_per_row: int) -> Dispatch:
    """The dispatch of tokens to their experts (N, k)."""
    sorted_experts, order = experts.flatten().sort(stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    every = torch.arange(n_experts, device=order.device)
    ends = torch.searchsorted(sorted_experts, every, right=True, out_int32=True)
    return Dispatch(order, inverse, sorted_experts, ends, experts.shape[1], tokens_per_row)


def statistics(
    experts: Tensor, scores: Tensor, logits: Tensor, counted: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Load (E,), balance loss and router z-loss of tokens: experts (N, k), scores and logits (N, E), counted (N,) or None.

    The balance loss is E sum_e f_e P_e (Fedus et al. 2021, eq. 4), f the share of the assignments that an expert has and P
    its mean probability: 1 for an even load, E where one expert has all. Sigmoid scores are divided by their sum
    (DeepSeek-V3, eq. 19). The z-loss is the mean square of log sum exp of the logits (Zoph et al. 2022, eq. 5).
    """
    E = scores.shape[1]
    weight = scores.new_ones(len(scores)) if counted is None else counted.to(scores.dtype)  # (N,)
    n = weight.sum().clamp(min=1)
    chosen = torch.zeros_like(scores, requires_grad=False).scatter(1, experts, weight[:, None].expand_as(experts))
    load = chosen.detach().sum(0)
    probabilities = scores / (scores.sum(-1, keepdim=True) + 1e-20)
    mean = (probabilities * weight[:, None]).sum(0) / n
    balance = E * (load / (n * experts.shape[1]) * mean).sum()
    z = (logits.logsumexp(-1).square() * weight).sum() / n
    return load, balance, z


class SortRows(torch.autograd.Function):
    """Rows (N, C), each k times, in a given order of the N k: gathers both ways, so that no sum depends on threads."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, order: Tensor, inverse: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.k = k
        return x[order if k == 1 else order // k]

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, d_y: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        d_x = d_y[inverse]
        return d_x if ctx.k == 1 else d_x.view(-1, ctx.k, d_x.shape[-1]).sum(1), None, None, None
