"""Optimizer states of sharded parameters: saved full or sharded, restored on any number of ranks.

torch saves states by the numbers of parameters, in the order of the groups. A tensor with the shape of its parameter
(moments) is sharded as the parameter is, and so is one that differs in the last dimension alone (scales of the blocks of
8-bit moments), though it is saved in full; anything else (step counters, Adafactor's rows and columns) is held in full
by every rank. So one rank's file can be loaded by eight, and shards of eight by one.
"""

from collections.abc import Sequence

from torch import Tensor
from torch.optim import Optimizer

from genai_pl.distributed.dtensor import full_tensor_on_cpu, is_dtensor, shard_like

State = dict[str, object]


def saved_state(optimizer: Optimizer, *, sharded: bool) -> State:
    """The state dict of an optimizer for a checkpoint.

    sharded: keep DTensors that are sharded as their parameter, for a sharded checkpoint; else gather all to RAM, a
        collective over their meshes
    """
    state = optimizer.state_dict()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    values = {
        # values of another shape are small: one number per row or column
        n: {
            name: v if sharded and _is_sharded_like(v, parameters[n]) else full_tensor_on_cpu(v)
            for name, v in values.items()
        }
        for n, values in state["state"].items()
    }
    return {**state, "state": values}


def restore_state(optimizer: Optimizer, saved: State) -> None:
    """Load a saved state into an optimizer, its values sharded as this run's parameters are.

    The saved groups bring hyperparameters, except `fused` and `foreach`: which kernel may step the parameters depends
    on how they are sharded here, not on how they were when the state was saved.
    """
    parameters = parameters_by_number(optimizer, saved)
    state = {
        n: {name: _shard_value(v, parameters[n]) for name, v in values.items()} for n, values in saved["state"].items()
    }
    # which kernel may step the parameters depends on how they are sharded here
    groups = [
        {**group, **{name: own[name] for name in ("fused", "foreach") if name in own}}
        for group, own in zip(saved["param_groups"], optimizer.param_groups, strict=True)
    ]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def shard_templates(contents: dict, weights: dict[str, Tensor], optimizers: Sequence[Optimizer]) -> dict[str, Tensor]:
    """The tensors of this run, by the names under which a sharded checkpoint stores those that are loaded into them.

    `load_shards` reads each stored tensor in the sharding of its template; names without one are read in full.
    """
    templates = {key: weights[name] for name, key in contents["state_dict"].items() if name in weights}
    for optimizer, saved in zip(optimizers, contents["optimizer_states"], strict=True):
        parameters = parameters_by_number(optimizer, saved)
        templates |= {
            v: parameters[n] for n, values in saved["state"].items() for v in values.values() if isinstance(v, str)
        }
    return templates


def parameters_by_number(optimizer: Optimizer, saved: State) -> dict[int, Tensor]:
    """This optimizer's parameters by the numbers that a saved state has for them: both go group by group, in order."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [n for group in saved["param_groups"] for n in group["params"]]
    return dict(zip(numbers, parameters, strict=True))


def _is_sharded_like(value: object, parameter: Tensor) -> bool:
    """Whether a value of the state has shape and placements of its parameter, as moments do."""
    return is_dtensor(value) and value.shape == parameter.shape and value.placements == parameter.placements


def _shard_value(value: object, parameter: Tensor) -> object:
    """A full value of an optimizer's state as the parameter needs it.

    Sharded where it has the parameter's shape, but for the last dimension, else replicated on the parameter's mesh;
    plain numbers, scalars and values for plain parameters unchanged.
    """
    if not isinstance(value, Tensor) or is_dtensor(value):
        return value
    if not is_dtensor(parameter) or value.ndim == 0:
        return value
    if (
        value.ndim == parameter.ndim > 1 and value.shape[:-1] == parameter.shape[:-1]
    ) or value.shape == parameter.shape:
        return shard_like(value, parameter)
    from torch.distributed.tensor import DTensor, Replicate

    mesh = parameter.device_mesh
    return DTensor.from_local(value.to(parameter.device), mesh, [Replicate()] * mesh.ndim, run_check=False)
