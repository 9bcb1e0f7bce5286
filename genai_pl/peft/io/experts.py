"""Experts in adapter files: PEFT wraps their tensors as parameters (`target_parameters`), two of them in one module.

Here gate and up projection of the experts are two layers, in transformers one parameter `gate_up_proj` of the module
`experts`, beside `down_proj`. PEFT nests its wrappers in the order of the module's parameters, so the name of a tensor in the
file says which one it is only together with the config. Elsewhere in this folder a parameter has a name of its own,
`...experts.gate_up_proj`; `nested` and `unnested` translate. The factors of E experts are flat in the file: A (E R, in), and B
(out, R E) with the expert last.
"""

from collections.abc import Container, Iterable, Mapping

from torch import Tensor

from genai_pl.config.model import ModelConfig
from genai_pl.errors import CheckpointError
from genai_pl.models.experts import ExpertLinear
from genai_pl.peft.targets import ModuleSite

INNER, OUTER = "gate_up_proj", "down_proj"  # in the order of transformers' parameters
GATE_UP = ("gate_proj", "up_proj")


def is_of_experts(site: ModuleSite) -> bool:
    """True if the site holds a tensor of experts."""
    return isinstance(site.inner, ExpertLinear)


def expert_parameters(
    config: ModelConfig, places: Mapping[str, ModuleSite]
) -> list[tuple[str, tuple[ModuleSite, ...]]]:
    """The parameters of experts in transformers by their whole name, each with the sites here that it joins."""
    found = []
    for layer in config.mixture_layers:
        ours, theirs = f"blocks.{layer}.mlp.experts", f"model.layers.{layer}.mlp.experts"
        found.append((f"{theirs}.{INNER}", tuple(places[f"{ours}.{name}"] for name in GATE_UP)))
        found.append((f"{theirs}.{OUTER}", (places[f"{ours}.{OUTER}"],)))
    return found


def nested(tensors: Mapping[str, Tensor], parameters: Container[str]) -> dict[str, Tensor]:
    """Tensors under PEFT's names: the later parameter of a module is the outer wrapper, and an only one has no level.

    parameters: whole names, as the tensors have them before ".lora_".
    """
    names = {}
    for name in tensors:
        parameter, _, kind = name.partition(".lora_")
        if parameter not in parameters:
            continue
        module = parameter.rpartition(".")[0]
        has_outer = any(other.startswith(f"{module}.{OUTER}.lora_") for other in tensors)
        level = ".base_layer" if parameter.endswith(INNER) and has_outer else ""
        names[name] = f"{module}{level}.lora_{kind}"
    return {names.get(name, name): tensor for name, tensor in tensors.items()}


def unnested(tensors: Mapping[str, Tensor], parameters: Iterable[str]) -> dict[str, Tensor]:
    """Tensors under the names of their parameters; `parameters` are PEFT's target_parameters, suffixes of those names.

    CheckpointError where the names do not say which parameter a tensor belongs to.
    """
    parameters = list(parameters)
    if not parameters:
        return dict(tensors)
    result = {}
    for name, tensor in tensors.items():
        module, _, kind = name.partition(".lora_")
        plain = module.removesuffix(".base_layer")
        if not plain.endswith(".experts") or not kind:
            result[name] = tensor
            continue
        both = any(other.startswith(f"{plain}.base_layer.lora_") for other in tensors)
        named = [p for p in (INNER, OUTER) if any(f"{plain}.{p}".endswith(f".{key}") for key in parameters)]
        wanted = (INNER if module != plain else OUTER) if both else named[0] if len(named) == 1 else None
        if wanted is None or wanted not in named:
            raise CheckpointError(f"tensor {name} fits none of target_parameters={parameters}")
        result[f"{plain}.{wanted}.lora_{kind}"] = tensor
    return result


def flat(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Factors as they are stored, of A (E, R, in) and B (E, out, R)."""
    return A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)


def unflat(A: Tensor, B: Tensor, n_experts: int) -> tuple[Tensor, Tensor]:
    """A (E, R, in) and B (E, out, R) of factors as they are stored; CheckpointError if they are not of E experts."""
    if A.shape[0] % n_experts or B.shape[1] != A.shape[0]:
        raise CheckpointError(f"factors of {A.shape[0]} and {B.shape[1]} rows are none of {n_experts} experts")
    return A.unflatten(0, (n_experts, -1)), B.unflatten(1, (-1, n_experts)).permute(2, 0, 1)


def block_diagonal(blocks: list[Tensor]) -> Tensor:
    """Matrices, or batches of them, as blocks on the diagonal of one, or of a batch."""
    rows, columns = (sum(block.shape[dim] for block in blocks) for dim in (-2, -1))
    result = blocks[0].new_zeros(*blocks[0].shape[:-2], rows, columns)
    row = column = 0
    for block in blocks:
        result[..., row : row + block.shape[-2], column : column + block.shape[-1]] = block
        row, column = row + block.shape[-2], column + block.shape[-1]
    return result
