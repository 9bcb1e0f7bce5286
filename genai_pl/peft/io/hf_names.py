"""What transformers calls the modules that adapters wrap, by the weight tables of the families."""

from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor, nn

from genai_pl.errors import CheckpointError
from genai_pl.models import WrappedDecoder
from genai_pl.models.hf.config import family_of
from genai_pl.models.hf.families import Weight
from genai_pl.models.hf.folder import PREFIXES
from genai_pl.peft.targets import ModuleSite, module_sites

PREFIX = "base_model.model."  # of every name in an adapter's file
# T5's embedding has a module per stack, and each is wrapped by itself
SHARED = {"shared": ("encoder.embed_tokens", "decoder.embed_tokens")}
HF_ONLY = ("pooler.dense",)  # in models of transformers, not in ours


class HFModule(NamedTuple):
    """A module of theirs and the places of ours that it stands for, joined along the output."""

    name: str
    parts: tuple[ModuleSite, ...]
    weights: tuple[Weight, ...]  # its tensors
    transposed: bool

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """A tensor over the outputs, one per part."""
        sizes = [site.inner.weight.shape[0] for site in self.parts]
        if tensor.shape[0] != sum(sizes):
            raise CheckpointError(f"{self.name} has {sum(sizes)} outputs here, in the file {tensor.shape[0]}")
        return tensor.split(sizes)


def hf_modules(model: nn.Module) -> list[HFModule]:
    """Every module with weights under its name in transformers; our own where no class of transformers is the model."""
    places = {name: site for site in module_sites(model) if site.parameters for name in site.names}
    rows = {row.hf_name: row for row in _table(model, places)}
    modules: list[HFModule] = []
    for row in rows.values():
        owners = [name.rpartition(".")[0] for name in row.names]
        if not all(name.endswith(".weight") for name in row.names) or any(owner not in places for owner in owners):
            continue
        name, _, kind = row.hf_name.rpartition(".")
        parts = tuple(places[owner] for owner in owners)
        if kind != "weight":  # a bare parameter of theirs, which PEFT cannot wrap
            modules += [_native_module(owner, site) for owner, site in zip(owners, parts, strict=True)]
            continue
        weights = [rows[key] for key in (row.hf_name, f"{name}.bias") if key in rows]
        modules += [HFModule(other, parts, tuple(weights), row.transposed) for other in SHARED.get(name, (name,))]
    return modules


def lookup(modules: Iterable[HFModule], name: str) -> HFModule | None:
    """The module of that name, whether or not the prefix of a model with a head stands before it."""
    by_name = {module.name: module for module in modules}
    plain = [name, *(name.removeprefix(prefix) for prefix in PREFIXES), *(prefix + name for prefix in PREFIXES)]
    return next((by_name[key] for key in plain if key in by_name), None)


def shortest_suffixes(chosen: Iterable[str], others: Iterable[str]) -> list[str]:
    """The shortest ends of the chosen names that are no ends of the others."""
    avoid = {end for name in (*others, *HF_ONLY) for end in _ends(name)}
    return list(dict.fromkeys(next((e for e in _ends(name) if e not in avoid), name) for name in chosen))


def _native_module(name: str, site: ModuleSite) -> HFModule:
    return HFModule(
        name, (site,), tuple(Weight(f"{name}.{kind}", (f"{name}.{kind}",)) for kind in site.parameters), False
    )


def _ends(name: str) -> list[str]:
    """Whole words from the right: c, b.c, a.b.c."""
    words = name.split(".")
    return [".".join(words[-n:]) for n in range(1, len(words) + 1)]


def _table(model: nn.Module, places: dict[str, ModuleSite]) -> list[Weight]:
    if isinstance(model, WrappedDecoder):
        ours = [f"{name}.{kind}" for name, site in places.items() for kind in site.parameters]
        return [Weight(name.removeprefix("inner."), (name,)) for name in ours]
    family = family_of(model.config)
    if family is None:
        first = {site.names[0]: site for site in places.values()}
        return [
            Weight(f"{name}.{kind}", (f"{name}.{kind}",)) for name, site in first.items() for kind in site.parameters
        ]
    # a tied head has no row of its own, but may be trained apart
    return family.table(replace(model.config, tie_embeddings=False))
