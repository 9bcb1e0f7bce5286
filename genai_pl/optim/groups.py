"""Parameter groups: which parameters are trained, and which of them decay."""

from collections.abc import Iterable

from torch import nn

from genai_pl.errors import ConfigError

NamedParameters = Iterable[tuple[str, nn.Parameter]]
Group = dict[str, object]
EXPERTS = "experts."  # in the names of tensors with a first dimension of experts


def trainable(named_parameters: NamedParameters) -> list[tuple[str, nn.Parameter]]:
    """The parameters that require gradients, a tied one once, under its first name; ConfigError if there are none."""
    names: dict[nn.Parameter, str] = {}
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            names.setdefault(parameter, name)
    if not names:
        raise ConfigError("nothing to train: every parameter is frozen; check peft and the layers it targets")
    return [(name, parameter) for parameter, name in names.items()]


def is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter is a matrix, or one of each expert; the biases of E experts are E vectors, although in one (E, out)."""
    return parameter.ndim >= (3 if EXPERTS in name and name.endswith("bias") else 2)


def decay_groups(named_parameters: NamedParameters, weight_decay: float) -> list[Group]:
    """Optimizer groups: matrices, embeddings among them, decay; biases and the gains of norms do not (as in nanoGPT).

    Parameters go in with their names, which torch keeps as `param_names`; groups have a `name` for the logs.
    """
    named = trainable(named_parameters)
    matrices = [(name, parameter) for name, parameter in named if is_matrix(name, parameter)]
    vectors = [(name, parameter) for name, parameter in named if not is_matrix(name, parameter)]
    groups: list[Group] = [
        {"params": matrices, "weight_decay": weight_decay, "name": "decay"},
        {"params": vectors, "weight_decay": 0.0, "name": "no_decay"},
    ]
    return [group for group in groups if group["params"]]
