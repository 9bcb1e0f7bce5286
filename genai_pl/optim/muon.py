"""Muon for hidden matrices, AdamW for every other parameter, as one optimizer.

Muon replaces the momentum of a matrix by the nearest semi-orthogonal matrix, so that an update moves all directions
equally (Jordan 2024). That argument holds for maps between hidden states; embeddings, heads, norms and biases get
AdamW. Orthogonalization needs
the full matrix: sharded ones are gathered, several at a time, and each rank orthogonalizes some of them.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from genai_pl.distributed.dtensor import is_dtensor, local_shard, map_across_ranks, shard_like, with_shard
from genai_pl.errors import ConfigError
from genai_pl.kernels.cpu_products import bf16_products_pay
from genai_pl.optim.adamw import has_fused_kernel
from genai_pl.optim.checks import check, choose
from genai_pl.optim.groups import EXPERTS, Group, NamedParameters, decay_groups, is_matrix, trainable
from genai_pl.optim.moments import (
    check_kind,
    closure_loss,
    narrow_kind,
    narrowed,
    restore_moments,
    steps_taken,
    wide_moments,
    widened,
)
from genai_pl.optim.narrow_adam import NarrowAdam

# parts of the names of tables that are looked up, and of scores that no hidden state is multiplied with
NOT_HIDDEN = ("embed", "lm_head", "position", "types", "relative")
NOT_HIDDEN += ("content_bias", "position_bias", "type_bias", "type_embed")
NEWTON_SCHULZ_STEPS = 5
BATCH_ELEMENTS = 2**24  # of matrices that are orthogonalized at once: small ones keep no device busy one by one
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # steepest at 0 rather than convergent (Jordan 2024)
ADJUST_LR: dict[str, Callable[[int, int], float]] = {
    "match_rms_adamw": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),  # Liu et al. 2025, eq. 4
    "original": lambda rows, columns: math.sqrt(max(1.0, rows / columns)),  # Jordan 2024
}


def muon(
    named_parameters: NamedParameters,
    *,
    lr: float,
    adam_lr: float | None,
    momentum: float,
    nesterov: bool,
    adjust_lr: str,
    betas: Sequence[float],
    eps: float,
    weight_decay: float,
    moments: str | None = None,
) -> "MuonAdamW":
    """Muon at `lr` for matrices between the embeddings and the head, AdamW at `adam_lr` (None: `lr`) for the rest.

    momentum, nesterov: of Muon's update before orthogonalization
    adjust_lr: factor by a matrix's size: match_rms_adamw, with which one lr suits both, or original
    betas, eps: of AdamW
    weight_decay: decoupled, of matrices under both
    moments: fp32, bf16 or int8, in which Muon's momentum and AdamW's moments are kept; None: the dtype of the weights
    """
    choose("optimizer.adjust_lr", adjust_lr, ADJUST_LR)
    if adam_lr is None and adjust_lr == "original":
        raise ConfigError("optimizer.adjust_lr=original needs optimizer.adam_lr: its lr (about 0.02) is not AdamW's")
    adam_lr = lr if adam_lr is None else adam_lr
    check("optimizer", lr=lr, adam_lr=adam_lr, momentum=momentum, betas=betas, eps=eps, weight_decay=weight_decay)
    named = trainable(named_parameters)
    # matrices for Muon, the rest for AdamW in groups with and without decay
    hidden = [(name, parameter) for name, parameter in named if is_hidden_matrix(name, parameter)]
    rest = [(name, parameter) for name, parameter in named if not is_hidden_matrix(name, parameter)]
    matrices = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "adjust_lr": adjust_lr}
    others = {"algorithm": "adamw", "lr": adam_lr, "betas": tuple(betas), "eps": eps}
    groups: list[Group] = []
    if hidden:
        matrices |= {"algorithm": "muon", "name": "matrices", "weight_decay": weight_decay}
        groups.append({"params": hidden, **matrices})
    for group in decay_groups(rest, weight_decay) if rest else []:
        fused = has_fused_kernel(group["params"])
        groups.append({**group, **others, "name": f"other_{group['name']}", "fused": fused})
    return MuonAdamW(groups, kind=narrow_kind(moments, groups))


def is_hidden_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon may step a parameter: a matrix between hidden states, not a table of vectors."""
    is_hidden = parameter.ndim == 2 or (parameter.ndim == 3 and EXPERTS in name)  # a 3-D tensor is a matrix per expert
    return is_hidden and is_matrix(name, parameter) and not any(part in name for part in NOT_HIDDEN)


def orthogonalize(matrices: Tensor) -> Tensor:
    """Nearly U V^T of the SVD of each matrix (..., rows, columns): singular values go to about 0.7 to 1.2 (Jordan 2024).

    Newton-Schulz steps of all matrices at once, in bfloat16 on a GPU. On a CPU in float32, or in bfloat16 where float32
    products may be rounded (`torch.set_float32_matmul_precision`, which precision=bf16 sets) and bfloat16 is faster.
    """
    shape = matrices.shape
    x = matrices.to(_products_dtype(matrices.device)).reshape(-1, *shape[-2:])  # (N, rows, columns)
    tall = x.size(1) > x.size(2)
    x = x.mT if tall else x  # the Gram matrix of the shorter side
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    a, b, c = NEWTON_SCHULZ
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).reshape(shape)


def _products_dtype(device: torch.device) -> torch.dtype:
    """The dtype of Newton-Schulz products on a device."""
    if device.type != "cpu":
        return torch.bfloat16
    may_round = torch.get_float32_matmul_precision() != "highest"
    # CPUs without bfloat16 units are 20 (160 x 640) to 46 (256 x 1024) times slower in it than in float32
    return torch.bfloat16 if may_round and bf16_products_pay() else torch.float32


class MuonAdamW(Optimizer):
    """Steps groups of `algorithm` muon (Jordan 2024) and adamw; each keeps its own `lr`, which schedulers scale.

    groups: parameter groups with a key `algorithm` and the options of that algorithm
    kind: of moments, as of `NarrowOptimizer`; None: in the dtype of the weights

    One optimizer with one state, so that checkpoints, schedules and loss scaling treat it as any other. An inner torch
    AdamW shares the adamw groups and the state.
    """

    def __init__(self, groups: list[Group], *, kind: str | None = None) -> None:
        self.kind = kind
        super().__init__(groups, defaults={})
        if kind is not None:
            check_kind(self, kind)
        self._share()

    def __getstate__(self) -> dict[str, object]:
        return {**super().__getstate__(), "kind": self.kind}

    def __setstate__(self, state: dict[str, object]) -> None:
        super().__setstate__(state)
        self._share()  # load_state_dict and unpickling bring new groups and a new state

    def _share(self) -> None:
        """Let an inner AdamW step the adamw groups on the shared state."""
        groups = [group for group in self.param_groups if group["algorithm"] == "adamw"]
        self._adamw = None
        if groups and self.kind is not None:
            self._adamw = NarrowAdam(groups, kind=self.kind, decoupled_weight_decay=True)
        elif groups:
            self._adamw = torch.optim.AdamW(groups)
        if self._adamw is not None:
            self._adamw.state = self.state

    def load_state_dict(self, state_dict: Mapping[str, object]) -> None:
        """Load a state whose moments are of any kind."""
        if self.kind is None:
            super().load_state_dict(widened(state_dict))
        else:
            super().load_state_dict({**state_dict, "state": {}})
            restore_moments(self, state_dict, self.kind)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """The closure's loss, after one step of every group."""
        loss = closure_loss(closure)
        for group in self.param_groups:
            if group["algorithm"] == "muon":
                self._step_matrices([p for p in group["params"] if p.grad is not None], group)
        if self._adamw is not None:
            self._adamw.step()
        return loss

    def _step_matrices(self, parameters: list[Tensor], group: Group) -> None:
        """Step the matrices of a group: of each mesh apart, as many at a time as the mesh has ranks; others by shape."""
        meshes: dict[DeviceMesh, list[Tensor]] = {}
        shapes: dict[torch.Size, list[Tensor]] = {}
        for parameter in parameters:
            if is_dtensor(parameter):
                meshes.setdefault(parameter.device_mesh, []).append(parameter)
            else:
                shapes.setdefault(parameter.shape, []).append(parameter)
        for shape, alike in shapes.items():
            n_at_once = max(1, BATCH_ELEMENTS // shape.numel())
            for first in range(0, len(alike), n_at_once):
                self._step_some(alike[first : first + n_at_once], group, None)
        for mesh, some in meshes.items():
            for first in range(0, len(some), mesh.size()):  # full matrices in memory
                self._step_some(some[first : first + mesh.size()], group, mesh)

    def _step_some(self, parameters: list[Tensor], group: Group, mesh: DeviceMesh | None) -> None:
        """Decay and move some matrices, of one shape or of one mesh; sharded ones are gathered to be orthogonalized."""
        updates = [self._update(parameter, group) for parameter in parameters]
        # Newton-Schulz on shards would communicate in each of its steps
        if mesh is None:
            directions = orthogonalize(torch.stack(updates)).unbind()
        else:
            directions = map_across_ranks(orthogonalize, updates, mesh)
        for parameter, direction in zip(parameters, directions, strict=True):
            scale = ADJUST_LR[group["adjust_lr"]](*parameter.shape[-2:])
            own = local_shard(parameter)
            own.mul_(1.0 - group["lr"] * group["weight_decay"])
            own.add_(local_shard(shard_like(direction, parameter)), alpha=-group["lr"] * scale)

    def _update(self, parameter: Tensor, group: Group) -> Tensor:
        """The momentum of a matrix after this step; with `nesterov`, a step ahead."""
        state, name = self.state[parameter], "momentum_buffer"
        if self.kind is None:
            if name not in state:
                state[name] = torch.zeros_like(parameter)
            mean, gradient = state[name], parameter.grad
        else:
            (mean,), gradient = wide_moments(state, parameter, name), local_shard(parameter.grad).float()
        mean.lerp_(gradient, 1.0 - group["momentum"])
        update = gradient.lerp(mean, group["momentum"]) if group["nesterov"] else mean
        if self.kind is None:
            return update
        state["step"] = steps_taken(state, parameter) + 1
        state |= narrowed(name, mean, parameter, state["step"], self.kind)
        return with_shard(update, parameter)
