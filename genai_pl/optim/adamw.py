"""Adam and AdamW: with L2 and with decoupled weight decay, on torch's fused kernel where there is one."""

from collections.abc import Sequence

import torch

from genai_pl.optim.checks import check
from genai_pl.optim.groups import NamedParameters, decay_groups
from genai_pl.optim.moments import narrow_kind, widened
from genai_pl.optim.narrow_adam import NarrowAdam


def adamw(
    named_parameters: NamedParameters,
    *,
    lr: float,
    betas: Sequence[float],
    eps: float,
    weight_decay: float,
    fused: bool | None = None,
    moments: str | None = None,
) -> torch.optim.Adam:
    """AdamW, whose decay of lr * weight_decay per step stays out of the moments (Loshchilov and Hutter 2019).

    named_parameters: pairs of name and parameter; matrices decay, vectors do not (`decay_groups`)
    lr: peak learning rate, which the schedule scales
    betas: decay of first and second moments
    eps: added to the root of the second moment
    fused: whether to use torch's fused kernel; None: where it can step these parameters
    moments: fp32, bf16 or int8, in which moments are kept; None: the dtype of the weights
    """
    return _build(torch.optim.AdamW, named_parameters, lr, betas, eps, weight_decay, fused, moments)


def adam(
    named_parameters: NamedParameters,
    *,
    lr: float,
    betas: Sequence[float],
    eps: float,
    weight_decay: float,
    fused: bool | None = None,
    moments: str | None = None,
) -> torch.optim.Adam:
    """Adam, whose decay is part of the gradient: grad + weight_decay * weight (Kingma and Ba 2015)."""
    return _build(torch.optim.Adam, named_parameters, lr, betas, eps, weight_decay, fused, moments)


def has_fused_kernel(named_parameters: NamedParameters) -> bool:
    """Whether torch can step these parameters in one kernel, which takes no mixture of sharded and plain tensors.

    On two CPU cores a step of a GPT takes 0.8, 3.1 and 4.2 ms (1.4M parameters) or 5.8, 19.7 and 17.5 ms (10.8M):
    fused, foreach and for-loop.
    """
    parameters = [parameter for _, parameter in named_parameters]
    kinds = {type(parameter) for parameter in parameters}  # tensor parallelism leaves norms unsharded
    return len(kinds) == 1 and all(parameter.device.type in ("cpu", "cuda") for parameter in parameters)


def _build(
    kind: type[torch.optim.Adam],
    named_parameters: NamedParameters,
    lr: float,
    betas: Sequence[float],
    eps: float,
    weight_decay: float,
    fused: bool | None,
    moments: str | None,
) -> torch.optim.Adam:
    """The optimizer of either kind, with checked options, decay groups and a decision about the fused kernel per group."""
    check("optimizer", lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
    groups = decay_groups(named_parameters, weight_decay)
    narrow = narrow_kind(moments, groups)
    for group in groups:
        group["fused"] = has_fused_kernel(group["params"]) if fused is None else fused
    # a tuple, since the list class of OmegaConf would make checkpoints unreadable with weights_only=True
    options = {"lr": lr, "betas": tuple(betas), "eps": eps}
    if narrow is None:
        optimizer = kind(groups, **options)
        optimizer.register_load_state_dict_pre_hook(lambda _, state: widened(state))  # of a run with moments in 8 bits
    else:
        decoupled = issubclass(kind, torch.optim.AdamW)
        optimizer = NarrowAdam(groups, kind=narrow, **options, decoupled_weight_decay=decoupled)
    # A fused step would unscale fp16 gradients itself, after clipping has seen them scaled; Lightning refuses to clip
    # then, in bf16 too. Let GradScaler unscale first, as for every other optimizer.
    optimizer._step_supports_amp_scaling = False
    return optimizer
