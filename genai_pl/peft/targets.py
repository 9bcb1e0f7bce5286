"""Adapter targets: the modules that an adapter wraps, named as in the model without adapters.

`module_sites` lists every module with its names and parents. Adapter layers are looked through: adding one adapter changes
neither the names nor the number of sites, so the same option means the same layers for a second adapter.
"""

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from torch import nn

from genai_pl.errors import ConfigError
from genai_pl.models import WrappedDecoder
from genai_pl.models.experts import ExpertLinear
from genai_pl.peft.adapter import AdapterLayer, adapters_of

ALL_LINEAR = "all-linear"
# XLNet's projection of distances has no batch dimension, so weights by row have no meaning; a scoring head is trained whole
SCORE_LAYERS = ("score", "score_dense")  # of a head for labels
NO_TARGETS = ("r_proj", *SCORE_LAYERS)


class ModuleSite(NamedTuple):
    """A place for a module in the model, together with the adapter layers that wrap the module there.

    names: dotted names without adapters; several where a module is shared (tied embeddings, repeated blocks).
    module: what stands there now, the outermost adapter layer or the module itself.
    holders: (parent, attribute) pairs that refer to it.
    """

    names: tuple[str, ...]
    module: nn.Module
    holders: tuple[tuple[nn.Module, str], ...]

    @property
    def leaf(self) -> str:
        """The last component of the name, "q_proj" for example."""
        return self.names[0].rpartition(".")[2]

    def is_called(self, name: str) -> bool:
        """True if `name` is a whole name of the site, or a suffix of one after a dot."""
        return any(own == name or own.endswith(f".{name}") for own in self.names)

    @property
    def inner(self) -> nn.Module | None:
        """The module without its adapter layers; None for an adapter layer that wraps nothing (virtual tokens)."""
        return base_module(self.module)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that the module without adapters holds itself, not in submodules."""
        parameters = {} if self.inner is None else self.inner._parameters
        return {name: parameter for name, parameter in parameters.items() if parameter is not None}

    def replace(self, module: nn.Module) -> None:
        """Put another module in this place, under every parent, in the training mode of the present one."""
        module.train(self.module.training)
        for parent, attribute in self.holders:
            setattr(parent, attribute, module)


def module_sites(model: nn.Module) -> list[ModuleSite]:
    """Every site of the model, in the order of a walk from the root; each module once."""
    known: dict[nn.Module, tuple[list[str], list[tuple[nn.Module, str]]]] = {}
    _walk(model, "", known)
    return [ModuleSite(tuple(names), module, tuple(holders)) for module, (names, holders) in known.items()]


def wrapped_module(module: nn.Module) -> nn.Module | None:
    """The module directly inside an adapter layer; None if `module` is no such layer or wraps nothing."""
    return module._modules.get("base") if isinstance(module, AdapterLayer) else None


def adapter_layers(module: nn.Module) -> list[AdapterLayer]:
    """The adapter layers around a module, outermost first."""
    layers = []
    while isinstance(module, AdapterLayer):
        layers.append(module)
        module = wrapped_module(module)
    return layers


def base_module(module: nn.Module | None) -> nn.Module | None:
    """The module inside all adapter layers around it."""
    while isinstance(module, AdapterLayer):
        module = wrapped_module(module)
    return module


def match(
    model: nn.Module,
    target_modules: str | Sequence[str] | None,
    *,
    default: Sequence[str],
    kinds: tuple[type[nn.Module], ...] = (nn.Linear,),
) -> list[ModuleSite]:
    """The sites of linear layers that the option `target_modules` means; ConfigError for names without such a layer.

    target_modules: a list of names, one regular expression for whole names, "all-linear" for the blocks' linear layers, or None
    for those of `default` that exist. The head is never among them: `modules_to_save` trains it. kinds: classes of layers that
    names may mean; "all-linear" means nn.Linear alone, as in PEFT, for which experts are no modules.
    """
    linears = _linears(model, kinds)
    if not linears:
        raise ConfigError(
            "peft.target_modules: this model has no torch.nn.Linear to adapt (transformers' Conv1D is none)"
        )
    # each form of the option gives the targets and the names that match nothing
    if target_modules is None:
        targets = [site for site in linears if any(map(site.is_called, default))]
        missing = [name for name in default if not any(site.is_called(name) for site in linears)]
        # a model run by transformers must have all default names or be given names: half of the default is no default
        missing = missing if isinstance(model, WrappedDecoder) or not targets else []
    elif target_modules == ALL_LINEAR:
        inside = {id(module) for block in model.blocks for module in block.modules()}
        targets = [site for site in linears if id(site.module) in inside and isinstance(site.inner, nn.Linear)]
        missing = []
    elif isinstance(target_modules, str):
        targets = [site for site in linears if any(_full_match(target_modules, name) for name in site.names)]
        missing = [] if targets else [f"{target_modules} (a regular expression of whole names; write [a,b] for names)"]
    else:
        targets = [site for site in linears if any(map(site.is_called, target_modules))]
        missing = [name for name in target_modules if not any(site.is_called(name) for site in linears)]
    if missing:
        raise ConfigError(f"peft.target_modules: {_why_not(model, missing[0])}; there are: {_leaves(linears)}")
    if not targets:
        raise ConfigError(f"peft.target_modules is empty; there are: {_leaves(linears)}")
    return targets


def listed(names: str | Iterable[str] | None) -> str | list[str] | None:
    """An option that names modules, as data that JSON can store: a tuple or OmegaConf list becomes a list."""
    return names if names is None or isinstance(names, str) else list(names)


def describe(model: nn.Module) -> list[str]:
    """Lines of the run's summary: each adapter with its options, the layers by kind, and the share of trained parameters."""
    # layers of one name, class and size are one line
    counts: dict[tuple[str, str, str, int], int] = {}
    for site in module_sites(model):
        for layer in adapter_layers(site.module):
            size = sum(p.numel() for name, p in layer.named_parameters() if not name.startswith("base."))
            row = (site.leaf, type(layer).__name__, _shape(base_module(layer)), size)
            counts[row] = counts.get(row, 0) + 1
    lines = [f"adapter     {adapter.method}: {_options(adapter.options)}" for adapter in adapters_of(model)]
    lines += [
        f"  {leaf:<12}{count:>4} x {kind}{shape}, {size:,} parameters each"
        for (leaf, kind, shape, size), count in counts.items()
    ]
    # in the words of PEFT's print_trainable_parameters
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    return [
        *lines,
        f"trainable params: {trained:,} || all params: {total:,} || trainable%: {100 * trained / total:.4f}",
    ]


def _walk(parent: nn.Module, prefix: str, known: dict) -> None:
    """Add the modules below `parent` to `known`: {module: (names, holders)}."""
    for attribute, module in parent._modules.items():  # named_children would leave out the second use of a shared block
        if module is None:
            continue
        is_known = module in known
        names, holders = known.setdefault(module, ([], []))
        names.append(prefix + attribute)
        holders.append((parent, attribute))
        inner = base_module(module)
        if not is_known and inner is not None:
            _walk(inner, f"{prefix}{attribute}.", known)


def _linears(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> list[ModuleSite]:
    """The sites of linear layers that an adapter may wrap."""
    head = base_module(model.lm_head)
    linears = [site for site in module_sites(model) if _is_linear(site.inner, kinds)]
    return [site for site in linears if site.inner is not head and site.leaf not in NO_TARGETS]


def _is_linear(module: nn.Module | None, kinds: tuple[type[nn.Module], ...]) -> bool:
    """True for a layer of these kinds; not for a class of transformers that uses its weight otherwise (routers, groups)."""
    if not isinstance(module, kinds):
        return False
    kind = type(module)
    return kind.forward is nn.Linear.forward or not kind.__module__.startswith("transformers.")


def _full_match(pattern: str, name: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise ConfigError(f"peft.target_modules={pattern}: not a regular expression ({error})") from None


def _why_not(model: nn.Module, name: str) -> str:
    """The reason why nothing called `name` can be wrapped, for an error message."""
    site = next((site for site in module_sites(model) if site.is_called(name)), None)
    if site is None:
        return f"no module is called {name}"
    if site.inner is base_module(model.lm_head) or isinstance(site.inner, nn.Embedding):
        return f"{name} is not adapted but trained whole, by peft.modules_to_save=[{name}]"
    return f"{name} is a {type(site.inner).__name__}, which is not adapted"


def _leaves(sites: list[ModuleSite]) -> str:
    return ", ".join(dict.fromkeys(site.leaf for site in sites))


def _shape(module: nn.Module | None) -> str:
    if isinstance(module, ExpertLinear):
        return f" {len(module.weight)} x {module.in_features} -> {module.out_features}"
    if isinstance(module, nn.Linear):
        return f" {module.in_features} -> {module.out_features}"
    return "" if module is None else f" of {type(module).__name__}"


def _options(options: dict[str, object]) -> str:
    return " ".join(f"{name}={value}" for name, value in options.items() if value not in (None, {}))
