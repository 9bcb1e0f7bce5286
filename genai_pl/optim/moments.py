"""Moments of optimizers in another number of bits than the weights: kept, widened for a step, saved and restored.

A step widens the moments of one weight, lets torch's own step use them, and narrows them again; so float32 moments exist
for one weight at a time.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer

from genai_pl.distributed.dtensor import divides_rows, is_dtensor, local_shard, with_shard
from genai_pl.errors import ConfigError
from genai_pl.optim.checks import choose
from genai_pl.optim.groups import Group
from genai_pl.optim.narrow import BLOCK, from_8_bits, to_8_bits, to_bfloat16

KINDS = ("fp32", "bf16", "int8")
SIGNED = {"exp_avg": True, "exp_avg_sq": False, "momentum_buffer": True}  # the moments, by torch's names for them
SCALE = "_scale"
SMALLEST = 4096  # numbers of the smallest matrix with moments in 8 bits, as in bitsandbytes: the rest weighs nothing
State = dict[str, object]


class NarrowOptimizer(Optimizer):
    """An optimizer of torch with moments as `kind` says; a subclass steps one parameter in `step_one`.

    kind: fp32; bf16: rounded at random, since a second moment that moves by 1 - beta2 = 0.001 would be rounded to where
        it was (Zamirai et al. 2020); int8: matrices from 4096 numbers on in blocks of 256, vectors in float32

    State of a parameter: `step`, and its moments by torch's names; codes of 8 bits have scales beside them, as
    `exp_avg_scale` for `exp_avg`. All are plain tensors, sharded as the parameter is.
    """

    def __init__(self, groups: list[Group], *, kind: str, **options: object) -> None:
        super().__init__(groups, **options)
        self.kind = kind
        check_kind(self, kind)

    def __getstate__(self) -> dict[str, object]:
        return {**super().__getstate__(), "kind": self.kind}  # a copy steps as this does

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """The closure's loss, after one step of every parameter that has a gradient."""
        loss = closure_loss(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.step_one(parameter, group)
        return loss

    def step_one(self, parameter: Tensor, group: Group) -> None:
        """Widen, step and narrow the moments of one parameter."""
        raise NotImplementedError

    def load_state_dict(self, state_dict: Mapping[str, object]) -> None:
        """Load a state, of another kind too; torch would cast codes and scales to the dtype of the weights."""
        super().load_state_dict({**state_dict, "state": {}})
        restore_moments(self, state_dict, self.kind)


def closure_loss(closure: Callable[[], Tensor] | None) -> Tensor | None:
    """The loss of a step's closure, which computes gradients; None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def narrow_kind(moments: str | None, groups: list[Group]) -> str | None:
    """The kind of moments to narrow to; None where torch's own, in the dtype of the weights, are what was asked for."""
    if moments is None:
        return None
    choose("optimizer.moments", moments, dict.fromkeys(KINDS))
    dtypes = {parameter.dtype for group in groups for _, parameter in group["params"]}
    return None if moments == "fp32" and dtypes == {torch.float32} else moments


def wide_moments(state: State, parameter: Tensor, *names: str) -> list[Tensor]:
    """Moments of this rank's shard of a parameter in float32; zeros before the first step."""
    own = local_shard(parameter)
    return [wide(state, name) if name in state else torch.zeros_like(own, dtype=torch.float32) for name in names]


def steps_taken(state: State, parameter: Tensor) -> Tensor:
    """The number of steps of a parameter so far, a scalar in float32 on its device."""
    device = local_shard(parameter).device
    return torch.as_tensor(state.get("step", 0), dtype=torch.float32, device=device).clone()


def narrowed(name: str, moment: Tensor, parameter: Tensor, count: Tensor, kind: str) -> State:
    """A moment of this rank's shard as the state keeps it, under its name or two. count: steps taken, a scalar."""
    if kind == "bf16":
        return {name: with_shard(to_bfloat16(moment, count), parameter)}
    if kind == "fp32" or is_small(parameter):
        return {name: with_shard(moment, parameter)}
    codes, scales = to_8_bits(moment, signed=SIGNED[name])
    return {name: with_shard(codes, parameter), name + SCALE: with_shard(scales, parameter)}


def restore_moments(optimizer: Optimizer, state_dict: Mapping[str, object], kind: str) -> None:
    """Give an optimizer the moments of a saved state of any kind, in its own."""
    numbers = [n for group in state_dict["param_groups"] for n in group["params"]]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for n, parameter in zip(numbers, parameters, strict=True):
        if saved := state_dict["state"].get(n):
            optimizer.state[parameter] = _as_kept(saved, parameter, kind)


def _as_kept(saved: State, parameter: Tensor, kind: str) -> State:
    """A saved state of one parameter in another kind, on the parameter's device; unchanged where it fits."""
    count = steps_taken(saved, parameter)
    kept: State = {"step": count}
    for name in (name for name in SIGNED if saved.get(name) is not None):
        own = narrowed(name, wide(saved, name).to(count.device), parameter, count, kind)
        fits = all(part in saved and saved[part].dtype == value.dtype for part, value in own.items())
        # codes and their scales go over as they are: narrowed again they could differ
        kept |= {part: saved[part].to(value.device, copy=True) for part, value in own.items()} if fits else own
    return kept


def is_small(parameter: Tensor) -> bool:
    """Whether a parameter keeps its moments in float32 where others have 8 bits: a vector, or a small matrix."""
    return parameter.ndim < 2 or parameter.numel() < SMALLEST


def moment_bytes(parameter: Tensor, kind: str, *, n: int = 2) -> int:
    """Bytes of the n moments of a parameter."""
    if kind == "int8" and not is_small(parameter):
        rows = parameter.numel() // parameter.size(-1)
        return n * (parameter.numel() + 4 * rows * -(-parameter.size(-1) // BLOCK))
    return n * parameter.numel() * (2 if kind == "bf16" else 4)


def check_kind(optimizer: Optimizer, kind: str) -> None:
    """ConfigError for parameters whose rows processes divide: blocks of 8-bit moments end with their row."""
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    if kind == "int8" and any(is_dtensor(p) and p.ndim > 1 and divides_rows(p) for p in parameters):
        raise ConfigError(
            "optimizer.moments=int8 keeps rows of weights whole, which tensor parallelism divides: optimizer.moments=bf16"
        )


def wide(state: State, name: str) -> Tensor:
    """A moment of this rank's shard in float32; a new tensor unless it is kept in float32."""
    moment = local_shard(state[name])
    if name + SCALE in state:
        return from_8_bits(moment, local_shard(state[name + SCALE]), signed=SIGNED[name])
    return moment.float()


def widened(state_dict: Mapping[str, object]) -> dict[str, object]:
    """A state dict with its 8-bit moments in float32, for torch's own optimizers, which would take codes for numbers."""
    states = {}
    for n, state in state_dict["state"].items():
        narrow = {name for name in SIGNED if name + SCALE in state}
        kept = {name: value for name, value in state.items() if name.removesuffix(SCALE) not in narrow}
        states[n] = kept | {name: with_shard(wide(state, name), state[name]) for name in narrow}
    return {**state_dict, "state": states}
