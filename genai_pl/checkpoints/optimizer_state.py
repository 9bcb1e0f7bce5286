"""How saved states of optimizers lie on processes that hold pieces of the parameters."""

from collections.abc import Sequence

from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.optim import Optimizer

from genai_pl.distributed.dtensor import full_tensor_on_cpu, shard_like

State = dict[str, object]


def saved_state(optimizer: Optimizer, *, sharded: bool) -> State:
    """What the optimizer is saved as: with whole tensors, or with those in pieces that are cut as their parameter is."""
    state = optimizer.state_dict()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    values = {
        # of tensors of another shape there are few: one value per row or column
        n: {
            name: v if sharded and _is_sharded_like(v, parameters[n]) else full_tensor_on_cpu(v)
            for name, v in values.items()
        }
        for n, values in state["state"].items()
    }
    return {**state, "state": values}


def restore_state(optimizer: Optimizer, saved: State) -> None:
    """Give the optimizer a saved state, cut as its parameters are."""
    parameters = parameters_by_number(optimizer, saved)
    state = {
        n: {name: _shard_value(v, parameters[n]) for name, v in values.items()} for n, values in saved["state"].items()
    }
    # which kernel steps the parameters depends on how they lie here
    groups = [
        {**group, **{name: own[name] for name in ("fused", "foreach") if name in own}}
        for group, own in zip(saved["param_groups"], optimizer.param_groups, strict=True)
    ]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def shard_templates(contents: dict, weights: dict[str, Tensor], optimizers: Sequence[Optimizer]) -> dict[str, Tensor]:
    """What each tensor of a checkpoint in pieces is to be cut as, by the name under which it is written."""
    templates = {key: weights[name] for name, key in contents["state_dict"].items() if name in weights}
    for optimizer, saved in zip(optimizers, contents["optimizer_states"], strict=True):
        parameters = parameters_by_number(optimizer, saved)
        templates |= {
            v: parameters[n] for n, values in saved["state"].items() for v in values.values() if isinstance(v, str)
        }
    return templates


def parameters_by_number(optimizer: Optimizer, saved: State) -> dict[int, Tensor]:
    """The parameters of an optimizer by the numbers that its saved state knows them by."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [n for group in saved["param_groups"] for n in group["params"]]
    return dict(zip(numbers, parameters, strict=True))


def _is_sharded_like(value: object, parameter: Tensor) -> bool:
    return isinstance(value, DTensor) and value.shape == parameter.shape and value.placements == parameter.placements


def _shard_value(value: object, parameter: Tensor) -> object:
    """A value of an optimizer's state as the parameter lies: in pieces if it has its shape, else whole on all processes."""
    if not isinstance(value, Tensor) or isinstance(value, DTensor):
        return value
    if not isinstance(parameter, DTensor) or value.ndim == 0:
        return value
    if value.shape == parameter.shape:
        return shard_like(value, parameter)
    mesh = parameter.device_mesh
    return DTensor.from_local(value.to(parameter.device), mesh, [Replicate()] * mesh.ndim, run_check=False)
