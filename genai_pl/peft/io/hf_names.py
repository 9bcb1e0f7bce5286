"""Hugging Face module names: the modules that adapters wrap, as transformers calls them.

The weight tables of the model families (models/hf/families) map tensor names; a module's name is that of its weight without
".weight". One module there may be several here: GPT-2's c_attn is q_proj, k_proj and v_proj.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from genai_pl.errors import CheckpointError
from genai_pl.models import WrappedDecoder
from genai_pl.models.hf.config import family_of
from genai_pl.models.hf.families import Weight
from genai_pl.models.hf.folder import PREFIXES
from genai_pl.peft.io.experts import expert_parameters, is_of_experts
from genai_pl.peft.targets import ModuleSite, module_sites

PREFIX = "base_model.model."  # before every tensor name in an adapter file
# T5's shared embedding is a module of each stack, and PEFT wraps each of them
SHARED = {"shared": ("encoder.embed_tokens", "decoder.embed_tokens")}
IN_FILES = (".block_sparse_moe.", ".mlp.")  # Mixtral's files call a module otherwise than its class does
HF_ONLY = ("pooler.dense",)  # module names that exist in transformers only; suffixes must not match them


class HFModule(NamedTuple):
    """A module of transformers and the sites here that it stands for.

    name: in transformers. parts: sites, whose outputs are joined in this order. weights: rows of the family's table for its
    weight and bias. transposed: True for GPT-2's Conv1D, whose weight is (in, out). interleaved: the outputs of the parts
    are joined by turns (gpt-oss's gate and up projection).
    """

    name: str
    parts: tuple[ModuleSite, ...]
    weights: tuple[Weight, ...]
    transposed: bool
    interleaved: bool = False

    @property
    def n_experts(self) -> int:
        """The number of experts whose weights are one tensor here; 0 for an ordinary layer."""
        return len(self.parts[0].inner.weight) if is_of_experts(self.parts[0]) else 0

    def split(self, tensor: Tensor, dim: int = 0) -> tuple[Tensor, ...]:
        """A tensor over the joined outputs, split into one per part; CheckpointError if the sizes do not add up."""
        sizes = [site.inner.weight.shape[1 if self.n_experts else 0] for site in self.parts]
        if tensor.shape[dim] != sum(sizes):
            raise CheckpointError(f"{self.name} has {sum(sizes)} outputs here, in the file {tensor.shape[dim]}")
        if self.interleaved:
            tensor = torch.cat([tensor.unflatten(dim, (-1, len(sizes))).select(dim, n) for n in range(len(sizes))], dim)
        return tensor.split(sizes, dim)

    def joined(self, tensor: Tensor, dim: int) -> Tensor:
        """A tensor over the outputs of one part after the other, in the order of the file; dim counts from the end."""
        if not self.interleaved:
            return tensor
        return torch.stack(tensor.chunk(len(self.parts), dim), dim).flatten(dim - 1, dim)


def hf_modules(model: nn.Module) -> list[HFModule]:
    """Every module with weights, under its name in transformers; under its own if no class of transformers is this model.

    A tensor of experts is a parameter there, and stands for a module here.
    """
    places = {name: site for site in module_sites(model) if site.parameters for name in site.names}
    rows = {row.hf_name: row for row in _table(model, places)}
    modules: list[HFModule] = []
    has_experts = alternate = False
    # a row of the table is a module if it maps to weights of known sites
    for row in rows.values():
        owners = [name.rpartition(".")[0] for name in row.names]
        if not all(name.endswith(".weight") for name in row.names) or any(owner not in places for owner in owners):
            continue
        name, _, kind = row.hf_name.replace(*IN_FILES).rpartition(".")
        parts = tuple(places[owner] for owner in owners)
        if row.expert is not None or (kind != "weight" and is_of_experts(parts[0])):
            has_experts, alternate = True, alternate or row.interleaved
            continue
        if kind != "weight":  # a bare parameter in transformers, which PEFT cannot wrap
            modules += [_native_module(owner, site) for owner, site in zip(owners, parts, strict=True)]
            continue
        weights = [rows[key] for key in (row.hf_name, f"{name}.bias") if key in rows]
        modules += [HFModule(other, parts, tuple(weights), row.transposed) for other in SHARED.get(name, (name,))]
    if has_experts:
        named = expert_parameters(model.config, places)
        modules += [HFModule(name, parts, (), False, alternate and len(parts) > 1) for name, parts in named]
    return modules


def lookup(modules: Iterable[HFModule], name: str) -> HFModule | None:
    """The module called `name`, with or without the prefix that a model with a head puts before its body."""
    by_name = {module.name: module for module in modules}
    plain = [name, *(name.removeprefix(prefix) for prefix in PREFIXES), *(prefix + name for prefix in PREFIXES)]
    return next((by_name[key] for key in plain if key in by_name), None)


def shortest_suffixes(chosen: Iterable[str], others: Iterable[str]) -> list[str]:
    """For each chosen name its shortest suffix, in whole components, that is no suffix of any other name.

    These are what target_modules holds, so that PEFT wraps the chosen modules and no others.

    >>> shortest_suffixes(["h.0.attn.c_proj"], ["h.0.mlp.c_proj"])
    ['attn.c_proj']
    """
    avoid = {end for name in (*others, *HF_ONLY) for end in _ends(name)}
    return list(dict.fromkeys(next((e for e in _ends(name) if e not in avoid), name) for name in chosen))


def _native_module(name: str, site: ModuleSite) -> HFModule:
    """A site under its own name, for what is a bare parameter in transformers."""
    return HFModule(
        name, (site,), tuple(Weight(f"{name}.{kind}", (f"{name}.{kind}",)) for kind in site.parameters), False
    )


def _ends(name: str) -> list[str]:
    """Suffixes in whole components, shortest first: c, b.c, a.b.c."""
    words = name.split(".")
    return [".".join(words[-n:]) for n in range(1, len(words) + 1)]


def _table(model: nn.Module, places: dict[str, ModuleSite]) -> list[Weight]:
    """The family's weight table for this model; of names as they are where there is no family."""
    if isinstance(model, WrappedDecoder):
        ours = [f"{name}.{kind}" for name, site in places.items() for kind in site.parameters]
        return [Weight(name.removeprefix("inner."), (name,)) for name in ours]
    family = family_of(model.config)
    if family is None:
        first = {site.names[0]: site for site in places.values()}
        return [
            Weight(f"{name}.{kind}", (f"{name}.{kind}",)) for name, site in first.items() for kind in site.parameters
        ]
    # a tied head has no row in the table, but an adapter may train a copy of it
    return family.table(replace(model.config, tie_embeddings=False))
