"""How saved states of optimizers lie on processes that hold pieces of the parameters."""

from collections.abc import Sequence

from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.optim import Optimizer

from genai_pl.distributed.dtensor import piece, whole

State = dict[str, object]


def saved_state(optimizer: Optimizer, *, in_pieces: bool) -> State:
    """What the optimizer is saved as: with whole tensors, or with those in pieces that are cut as their parameter is."""
    state = optimizer.state_dict()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    kept = {
        # of tensors of another shape there are few: one value per row or column
        n: {name: v if in_pieces and _is_cut(v, parameters[n]) else whole(v) for name, v in values.items()}
        for n, values in state["state"].items()
    }
    return {**state, "state": kept}


def restore_state(optimizer: Optimizer, saved: State) -> None:
    """Give the optimizer a saved state, cut as its parameters are."""
    owners = find_owners(optimizer, saved)
    state = {n: {name: _like(v, owners[n]) for name, v in kept.items()} for n, kept in saved["state"].items()}
    # which kernel steps the parameters depends on how they lie here
    groups = [
        {**group, **{name: own[name] for name in ("fused", "foreach") if name in own}}
        for group, own in zip(saved["param_groups"], optimizer.param_groups, strict=True)
    ]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def places(contents: dict, weights: dict[str, Tensor], optimizers: Sequence[Optimizer]) -> dict[str, Tensor]:
    """What each tensor of a checkpoint in pieces is to be cut as, by the name under which it is written."""
    found = {key: weights[name] for name, key in contents["state_dict"].items() if name in weights}
    for optimizer, saved in zip(optimizers, contents["optimizer_states"], strict=True):
        owners = find_owners(optimizer, saved)
        found |= {v: owners[n] for n, kept in saved["state"].items() for v in kept.values() if isinstance(v, str)}
    return found


def find_owners(optimizer: Optimizer, saved: State) -> dict[int, Tensor]:
    """The parameters of an optimizer by the numbers that its saved state knows them by."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [n for group in saved["param_groups"] for n in group["params"]]
    return dict(zip(numbers, parameters, strict=True))


def _is_cut(value: object, parameter: Tensor) -> bool:
    return isinstance(value, DTensor) and value.shape == parameter.shape and value.placements == parameter.placements


def _like(value: object, parameter: Tensor) -> object:
    """A value of an optimizer's state as the parameter lies: in pieces if it has its shape, else whole on all processes."""
    if not isinstance(value, Tensor) or isinstance(value, DTensor):
        return value
    if not isinstance(parameter, DTensor) or value.ndim == 0:
        return value
    if value.shape == parameter.shape:
        return piece(value, parameter)
    mesh = parameter.device_mesh
    return DTensor.from_local(value.to(parameter.device), mesh, [Replicate()] * mesh.ndim, run_check=False)
