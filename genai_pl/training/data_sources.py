"""Data of a run: one source, or a mixture of those that `data.sources` names, as the data module that reads it.

A source takes the options of the group `data` where it is of the same kind, else the defaults of its own kind; sizes of
rows and batches are those of the group. What it names itself wins.
"""

from collections.abc import Mapping, Sequence

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from genai_pl.data.datamodule import RowsDataModule
from genai_pl.data.mixture import Points
from genai_pl.data.mixture_datamodule import MixedSource, MixtureDataModule, naming
from genai_pl.errors import ConfigError
from genai_pl.modules import BaseModule
from genai_pl.recipes.made import check_prepared
from genai_pl.training.config_errors import did_you_mean
from genai_pl.training.targets import instantiate, locate_target

MIXTURE_OPTIONS = ("sources", "mix_by", "mix_temperature")  # of the group `data`, for a mixture alone
OWN_OPTIONS = ("kind", "weight", "epochs", "cap")  # of a source, beside those of its kind
SCHEMAS = {"text": "data"}  # kinds whose schema has another name
COMMON = ("seq_len", "batch_size", "val_batch_size", "workers", "shuffle")  # of all sources together
MIXED_KINDS = ("text", "chat", "preference", "pairs", "prompts", "unpaired", "seq2seq")


def build_data(config: DictConfig, objective: type[BaseModule]) -> RowsDataModule:
    """The data module of `config.data`; ConfigError for data that the objective cannot use."""
    values = OmegaConf.to_container(config.data, resolve=True)
    options = {name: value for name, value in values.items() if name not in MIXTURE_OPTIONS}
    names = HydraConfig.get().runtime.choices
    if not values.get("sources"):
        check_prepared(config.data.path)
        data = instantiate({**options, "path": config.data.path}, at="data", seed=config.seed)
        if data.kind not in (objective.data_kind, *objective.further_kinds):
            raise ConfigError(f"objective={names.objective} needs data={objective.data_kind}, not data={names.data}")
        return data
    return _mixture(values, options, objective, objective_name=names.objective, seed=config.seed)


def _mixture(
    values: Mapping[str, object],
    options: Mapping[str, object],
    objective: type[BaseModule],
    *,
    objective_name: str,
    seed: int,
) -> MixtureDataModule:
    """The mixture of the sources in `values`; options: of the group `data`, for sources of its kind."""
    sources = values["sources"]
    for name in sources:
        if not isinstance(name, str) or not name.replace("-", "_").isidentifier():
            raise ConfigError(f"data.sources.{name}: a name is of letters, digits, - and _, and begins with a letter")
    group_kind = locate_target(options["_target_"]).kind
    built = [
        _source(name, source, options, group_kind, objective, objective_name=objective_name, seed=seed)
        for name, source in sources.items()
    ]
    without = [source.name for source in built if source.weight is None]
    if without and len(without) < len(built):
        raise ConfigError(
            f"data.sources.{without[0]}.weight: missing, and others have one; give a weight to all sources, or to none to "
            "mix by size"
        )
    if all(source.weight is not None and not any(w for _, w in source.weight) for source in built):
        raise ConfigError("data.sources: every weight is 0; give one that is above")
    return MixtureDataModule(
        built,
        kind=objective.data_kind,
        by_tokens=values["mix_by"] == "tokens",
        temperature=values["mix_temperature"],
        **{name: options[name] for name in COMMON},
        seed=seed,
    )


def _source(
    name: str,
    source: Mapping[str, object],
    options: Mapping[str, object],
    group_kind: str,
    objective: type[BaseModule],
    *,
    objective_name: str,
    seed: int,
) -> MixedSource:
    """One source, with the options that it leaves out filled in."""
    option = f"data.sources.{name}"
    # its kind, which the objective must be able to use
    kind = source.get("kind", group_kind)
    usable = tuple(dict.fromkeys((objective.data_kind, *objective.source_kinds)))
    if kind not in usable:
        known = kind in MIXED_KINDS
        raise ConfigError(
            f"{option}.kind={kind}: objective={objective_name} reads {' and '.join(usable)}"
            + ("" if known else did_you_mean(str(kind), MIXED_KINDS))
        )
    if kind not in MIXED_KINDS:
        raise ConfigError(f"data.sources: data={kind} is of one source; give data.path")
    # its options: of its kind, of the group, its own
    defaults = OmegaConf.to_container(ConfigStore.instance().load(f"schema/{SCHEMAS.get(kind, kind)}.yaml").node)
    fields = {key: value for key, value in defaults.items() if key not in MIXTURE_OPTIONS}
    inherited = options if kind == group_kind else {key: options[key] for key in (*COMMON, "val_fraction")}
    own = {key: value for key, value in source.items() if key not in OWN_OPTIONS}
    for key in own:
        if key in COMMON or key not in fields or key.startswith("_"):
            place = f"it is of all sources together: data.{key}" if key in COMMON else "no such option"
            raise ConfigError(f"{option}.{key}: {place}{did_you_mean(key, [*fields, *OWN_OPTIONS])}")
    if "path" not in own:
        raise ConfigError(f"{option}.path: missing; name its files")
    check_prepared(own["path"])
    node = {**fields, **inherited, "val_path": None, **own}
    for key, value in node.items():
        if value == "???":
            raise ConfigError(f"{option}.{key}: missing; give it, or data={kind}, which has a default")
    with naming(name):
        data = instantiate(node, at=option, seed=seed)
    weight = None if source.get("weight") is None else read_weight(source["weight"], f"{option}.weight")
    limits = {key: _count(source.get(key), f"{option}.{key}") for key in ("epochs", "cap")}
    return MixedSource(name, data, weight, **limits)


def read_weight(value: object, option: str) -> Points:
    """The points of a weight: a number, or a list of [fraction of the run, weight] by increasing fraction.

    >>> read_weight(2, "w"), read_weight([[0, 1], [1, 0.5]], "w")
    ([(0.0, 2.0)], [(0.0, 1.0), (1.0, 0.5)])
    """
    points = [[0.0, value]] if not isinstance(value, Sequence) else value
    valid = not isinstance(value, str) and bool(points)
    valid = valid and all(isinstance(p, Sequence) and not isinstance(p, str) and len(p) == 2 for p in points)
    valid = valid and all(_is_number(x) for point in points for x in point)
    if (
        not valid
        or sorted({x for x, _ in points}) != [x for x, _ in points]
        or not 0 <= points[0][0] <= points[-1][0] <= 1
    ):
        raise ConfigError(
            f"{option}={value}: expected a number of at least 0, or [fraction of the run, weight] pairs by increasing "
            "fraction, such as [[0, 1], [0.8, 1], [1, 4]]"
        )
    return [(float(x), float(weight)) for x, weight in points]


def _is_number(value: object) -> bool:
    """Whether a value is a finite number of at least 0."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf")


def _count(value: object, option: str) -> int | None:
    """A whole number of at least 1, or None."""
    if value is not None and (type(value) is not int or value < 1):
        raise ConfigError(f"{option}={value}: expected a whole number of at least 1")
    return value
