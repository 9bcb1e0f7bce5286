"""LoRA options in adapter_config.json, in both directions."""

import math
import re
from collections.abc import Iterable
from typing import NamedTuple

from genai_pl.errors import CheckpointError
from genai_pl.peft.io.hf_names import PREFIX, shortest_suffixes
from genai_pl.peft.io.tensors import check_neutral

UNDERSTOOD = (
    "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "init_lora_weights",
    # keys of features that are off
    "megatron_core", "qalora_group_size", "runtime_config", "loftq_config", "eva_config", "ensure_weight_tying",
)  # fmt: skip
# initializations that leave the base unchanged, so that the file describes the adapter completely
KEEPING_BASE = (True, False, None, "gaussian", "eva", "orthogonal")


class Size(NamedTuple):
    """Rank and alpha of one layer."""

    rank: int
    alpha: float


def check_config(config: dict[str, object]) -> None:
    """CheckpointError for a config with features that our LoRA lacks, or without rank and alpha."""
    check_neutral(config, UNDERSTOOD)
    init = config.get("init_lora_weights")
    if init not in KEEPING_BASE:
        raise CheckpointError(
            f"init_lora_weights={init!r} changes the base: let PEFT convert it to plain LoRA when saving"
        )
    for key in ("r", "lora_alpha"):
        if not isinstance(config.get(key), int | float):
            raise CheckpointError(f"{key}={config.get(key)!r} is not a number")


def size_of(scaling: float, rank: int, *, rslora: bool) -> Size:
    """Rank and the alpha that gives this scaling; a whole number where rounding errors allow."""
    alpha = scaling * (math.sqrt(rank) if rslora else rank)
    return Size(rank, round(alpha) if math.isclose(alpha, round(alpha)) else alpha)


def to_config(
    options: dict[str, object], sizes: dict[str, Size], names: list[str], parameters: Iterable[str] = ()
) -> dict[str, object]:
    """PEFT's keys for layers of these sizes, {module name: size}, among all module names of the model.

    parameters: those of the names that are parameters in transformers, the tensors of experts. PEFT knows no dropout there.
    """
    parameters = set(parameters)
    adapted = {name for name in sizes if name in parameters}
    others = [name for name in names if name not in sizes]
    common = Size(options["rank"], options["alpha"])
    patterns = {key: _pattern({n: s[i] for n, s in sizes.items()}, common[i]) for i, key in enumerate(Size._fields)}
    return {
        "r": common.rank,
        "lora_alpha": common.alpha,
        "lora_dropout": 0.0 if adapted else options["dropout"],
        "use_rslora": options["rslora"],
        "use_dora": options["dora"],
        "bias": "none",
        "init_lora_weights": True,
        "target_modules": shortest_suffixes(
            [name for name in sizes if name not in adapted], [*others, *(name for name in names if name in parameters)]
        ),
        "rank_pattern": patterns["rank"],
        "alpha_pattern": patterns["alpha"],
        **({"target_parameters": shortest_suffixes([n for n in sizes if n in adapted], others)} if adapted else {}),
    }


def size_in(config: dict[str, object], tensor: str, rank: int) -> Size:
    """Rank and alpha of the layer whose A is called `tensor`; alpha_pattern holds regular expressions for ends of names."""
    name = tensor.removeprefix(PREFIX).removesuffix(".lora_A.weight")
    pattern = config.get("alpha_pattern") or {}
    alphas = (alpha for key, alpha in pattern.items() if re.fullmatch(rf"(.*\.)?({key})", name))
    return Size(rank, next(alphas, config["lora_alpha"]))


def options_of(
    config: dict[str, object], sizes: dict[str, Size], saved_modules: list[str], names: Iterable[str]
) -> dict[str, object]:
    """Our options for layers of these sizes and fully trained layers `saved_modules`; `names` are all of the model."""
    if not sizes:
        raise CheckpointError("no layer of LoRA in it")
    names = list(names)
    # names are as short as they can be without matching other modules
    rank, alpha = config["r"], config["lora_alpha"]
    return {
        "rank": rank,
        "alpha": alpha,
        "dropout": config.get("lora_dropout", 0.0),
        "rslora": bool(config.get("use_rslora")),
        "dora": bool(config.get("use_dora")),
        "target_modules": shortest_suffixes(sizes, [name for name in names if name not in sizes]),
        "rank_pattern": _pattern({name: size.rank for name, size in sizes.items()}, rank),
        "alpha_pattern": _pattern({name: size.alpha for name, size in sizes.items()}, alpha),
        "modules_to_save": shortest_suffixes(saved_modules, [name for name in names if name not in saved_modules])
        or None,
    }


def as_plain_lora(options: dict[str, object]) -> dict[str, object]:
    """The options of the adapter as it is written.

    PiSSA subtracts its initial factors, which is LoRA of twice the rank beside an unchanged base; alpha grows with it, so that
    the scaling stays the same (by sqrt(2) for rsLoRA).
    """
    if options["init"] != "pissa":
        return options
    grow = math.sqrt(2) if options["rslora"] else 2
    return options | {
        "init": "default",
        "rank": 2 * options["rank"],
        "alpha": grow * options["alpha"],
        "rank_pattern": {name: 2 * rank for name, rank in options["rank_pattern"].items()},
        "alpha_pattern": {name: grow * alpha for name, alpha in options["alpha_pattern"].items()},
    }


def _pattern(values: dict[str, float], common: float) -> dict[str, float]:
    """{shortest suffix: value} for the names whose value is not the common one."""
    pattern = {}
    for value in sorted(set(values.values()) - {common}):
        others = [name for name in values if values[name] != value]
        pattern |= dict.fromkeys(shortest_suffixes([name for name in values if values[name] == value], others), value)
    return pattern
