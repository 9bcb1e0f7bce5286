"""Adam and AdamW whose moments are kept in another number of bits than the weights.

A step widens the moments of one weight, lets torch's own Adam step it, and narrows them again; so float32 moments exist
for one weight at a time.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.optim.adam import adam as torch_adam

from genai_pl.distributed.dtensor import divides_rows, is_dtensor, local_shard, with_shard
from genai_pl.errors import ConfigError
from genai_pl.optim.groups import Group
from genai_pl.optim.narrow import BLOCK, from_8_bits, to_8_bits, to_bfloat16

KINDS = ("fp32", "bf16", "int8")
SIGNED = {"exp_avg": True, "exp_avg_sq": False}  # the moments, by torch's names for them
SCALE = "_scale"
SMALLEST = 4096  # numbers of the smallest matrix with moments in 8 bits, as in bitsandbytes: the rest weighs nothing
State = dict[str, object]


class NarrowAdam(torch.optim.Adam):
    """Adam with moments as `kind` says; `decoupled_weight_decay` makes it AdamW.

    kind: fp32; bf16: rounded at random, since a second moment that moves by 1 - beta2 = 0.001 would be rounded to where
        it was (Zamirai et al. 2020); int8: matrices from 4096 numbers on in blocks of 256, vectors in float32

    State of a parameter: `step`, `exp_avg` and `exp_avg_sq`, as torch's, and with codes of 8 bits `exp_avg_scale` and
    `exp_avg_sq_scale`. All are plain tensors, sharded as the parameter is.
    """

    def __init__(self, groups: list[Group], *, kind: str, **options: object) -> None:
        super().__init__(groups, **options)
        self.kind = kind
        if kind == "int8":
            for parameter in (p for group in self.param_groups for p in group["params"]):
                check_rows(parameter)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """The closure's loss, after one step of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, group)
        return loss

    def _step(self, parameter: Tensor, group: Group) -> None:
        """Widen, step and narrow the moments of one parameter."""
        own, state = local_shard(parameter), self.state[parameter]
        count = state.get("step", torch.zeros((), dtype=torch.float32, device=own.device))
        moments = [wide(state, name) if state else torch.zeros_like(own, dtype=torch.float32) for name in SIGNED]
        weight, gradient = own.float(), local_shard(parameter.grad).float()
        torch_adam(
            [weight], [gradient], [moments[0]], [moments[1]], [], [count],
            foreach=False, fused=bool(group["fused"]), amsgrad=False, maximize=False,
            beta1=group["betas"][0], beta2=group["betas"][1], lr=group["lr"], eps=group["eps"],
            weight_decay=group["weight_decay"], decoupled_weight_decay=group["decoupled_weight_decay"],
        )  # fmt: skip
        own.copy_(weight)  # itself where the weight is in float32
        state["step"] = count
        for name, moment in zip(SIGNED, moments, strict=True):
            state |= self._narrow(name, moment, parameter, count)

    def _narrow(self, name: str, moment: Tensor, parameter: Tensor, count: Tensor) -> State:
        """A moment of this rank's shard as the state keeps it, under its name or two."""
        if self.kind == "bf16":
            return {name: with_shard(to_bfloat16(moment, count), parameter)}
        if self.kind == "fp32" or is_small(parameter):
            return {name: with_shard(moment, parameter)}
        codes, scales = to_8_bits(moment, signed=SIGNED[name])
        return {name: with_shard(codes, parameter), name + SCALE: with_shard(scales, parameter)}

    def load_state_dict(self, state_dict: Mapping[str, object]) -> None:
        """Load a state, of another kind too; torch would cast codes and scales to the dtype of the weights."""
        super().load_state_dict({**state_dict, "state": {}})
        numbers = [n for group in state_dict["param_groups"] for n in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        for n, parameter in zip(numbers, parameters, strict=True):
            if saved := state_dict["state"].get(n):
                self.state[parameter] = self._as_kept(saved, parameter)

    def _as_kept(self, saved: State, parameter: Tensor) -> State:
        """A saved state of one parameter, in this optimizer's kind, on the parameter's device; unchanged where it fits."""
        count = torch.as_tensor(saved["step"], dtype=torch.float32, device=local_shard(parameter).device).clone()
        kept: State = {"step": count}
        for name in SIGNED:
            own = self._narrow(name, wide(saved, name).to(count.device), parameter, count)
            fits = all(part in saved and saved[part].dtype == value.dtype for part, value in own.items())
            # codes and their scales go over as they are: narrowed again they could differ
            kept |= {part: saved[part].to(value.device, copy=True) for part, value in own.items()} if fits else own
        return kept


def is_small(parameter: Tensor) -> bool:
    """Whether a parameter keeps its moments in float32 where others have 8 bits: a vector, or a small matrix."""
    return parameter.ndim < 2 or parameter.numel() < SMALLEST


def moment_bytes(parameter: Tensor, kind: str) -> int:
    """Bytes of both moments of a parameter."""
    if kind == "int8" and not is_small(parameter):
        rows = parameter.numel() // parameter.size(-1)
        return 2 * (parameter.numel() + 4 * rows * -(-parameter.size(-1) // BLOCK))
    return 2 * parameter.numel() * (2 if kind == "bf16" else 4)


def check_rows(parameter: Tensor) -> None:
    """ConfigError for a parameter whose rows are divided among processes: blocks of 8-bit moments end with their row."""
    if is_dtensor(parameter) and parameter.ndim > 1 and divides_rows(parameter):
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
    """A state dict of Adam with its 8-bit moments in float32, for torch's own optimizers, which would take codes for numbers."""
    states = {}
    for n, state in state_dict["state"].items():
        narrow = {name for name in SIGNED if name + SCALE in state}
        kept = {name: value for name, value in state.items() if name.removesuffix(SCALE) not in narrow}
        states[n] = kept | {name: with_shard(wide(state, name), state[name]) for name in narrow}
    return {**state_dict, "state": states}
