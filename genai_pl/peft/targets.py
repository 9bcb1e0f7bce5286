"""Which modules an adapter wraps: found by the names they have in the model without adapters."""

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from torch import nn

from genai_pl.errors import ConfigError
from genai_pl.models import WrappedDecoder
from genai_pl.peft.adapter import AdapterLayer, adapters_of

ALL_LINEAR = "all-linear"
# XLNet's projection of distances has no batch, so rows cannot choose there; a head that scores is trained whole
NO_TARGETS = ("r_proj", "score")


class ModuleSite(NamedTuple):
    """A place in the model, with whatever adapters wrap the module there."""

    names: tuple[str, ...]  # more than one where a module is shared
    module: nn.Module
    holders: tuple[tuple[nn.Module, str], ...]  # whose attribute it is

    @property
    def leaf(self) -> str:
        """The last part of the name."""
        return self.names[0].rpartition(".")[2]

    def is_called(self, name: str) -> bool:
        """Whether that is the name, or the end of it from a dot on."""
        return any(own == name or own.endswith(f".{name}") for own in self.names)

    @property
    def inner(self) -> nn.Module | None:
        """The module without the adapters around it; None where an adapter stands for itself."""
        return base_module(self.module)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Those that the module holds itself."""
        parameters = {} if self.inner is None else self.inner._parameters
        return {name: parameter for name, parameter in parameters.items() if parameter is not None}

    def replace(self, module: nn.Module) -> None:
        """Let another module stand here."""
        module.train(self.module.training)
        for parent, attribute in self.holders:
            setattr(parent, attribute, module)


def module_sites(model: nn.Module) -> list[ModuleSite]:
    """Every place of the model; adapters change neither the places nor their names."""
    known: dict[nn.Module, tuple[list[str], list[tuple[nn.Module, str]]]] = {}
    _walk(model, "", known)
    return [ModuleSite(tuple(names), module, tuple(holders)) for module, (names, holders) in known.items()]


def wrapped_module(module: nn.Module) -> nn.Module | None:
    """What an adapter layer wraps, or None."""
    return module._modules.get("base") if isinstance(module, AdapterLayer) else None


def adapter_layers(module: nn.Module) -> list[AdapterLayer]:
    """The adapter layers around a module, the outermost first."""
    layers = []
    while isinstance(module, AdapterLayer):
        layers.append(module)
        module = wrapped_module(module)
    return layers


def base_module(module: nn.Module | None) -> nn.Module | None:
    """The module without the adapter layers around it."""
    while isinstance(module, AdapterLayer):
        module = wrapped_module(module)
    return module


def match(model: nn.Module, target_modules: str | Sequence[str] | None, *, default: Sequence[str]) -> list[ModuleSite]:
    """The linear layers that `target_modules` means: names, one regular expression, "all-linear", or None.

    None means those of the default names that exist. The head is never among them.
    """
    linears = _linears(model)
    if target_modules is None:
        targets = [site for site in linears if any(map(site.is_called, default))]
        missing = [name for name in default if not any(site.is_called(name) for site in linears)]
        # what transformers calls otherwise must be named: half of the default would be no default
        missing = missing if isinstance(model, WrappedDecoder) or not targets else []
    elif target_modules == ALL_LINEAR:
        inside = {id(module) for block in model.blocks for module in block.modules()}
        targets, missing = [site for site in linears if id(site.module) in inside], []
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
    """An option that names modules as plain data."""
    return names if names is None or isinstance(names, str) else list(names)


def describe(model: nn.Module) -> list[str]:
    """Lines on what is adapted: the adapters, a table of layers, and how much of the model is trained."""
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
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    return [
        *lines,
        f"trainable params: {trained:,} || all params: {total:,} || trainable%: {100 * trained / total:.4f}",
    ]


def _walk(parent: nn.Module, prefix: str, known: dict) -> None:
    for attribute, module in parent._modules.items():  # named_children leaves out a block that is used again
        if module is None:
            continue
        is_known = module in known
        names, holders = known.setdefault(module, ([], []))
        names.append(prefix + attribute)
        holders.append((parent, attribute))
        inner = base_module(module)
        if not is_known and inner is not None:
            _walk(inner, f"{prefix}{attribute}.", known)


def _linears(model: nn.Module) -> list[ModuleSite]:
    head = base_module(model.lm_head)
    linears = [site for site in module_sites(model) if isinstance(site.inner, nn.Linear)]
    return [site for site in linears if site.inner is not head and site.leaf not in NO_TARGETS]


def _full_match(pattern: str, name: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise ConfigError(f"peft.target_modules={pattern}: not a regular expression ({error})") from None


def _why_not(model: nn.Module, name: str) -> str:
    """Why nothing of that name can be wrapped."""
    site = next((site for site in module_sites(model) if site.is_called(name)), None)
    if site is None:
        return f"no module is called {name}"
    if site.inner is base_module(model.lm_head) or isinstance(site.inner, nn.Embedding):
        return f"{name} is not adapted but trained whole, by peft.modules_to_save=[{name}]"
    return f"{name} is a {type(site.inner).__name__}, which is not adapted"


def _leaves(sites: list[ModuleSite]) -> str:
    return ", ".join(dict.fromkeys(site.leaf for site in sites))


def _shape(module: nn.Module | None) -> str:
    if isinstance(module, nn.Linear):
        return f" {module.in_features} -> {module.out_features}"
    return "" if module is None else f" of {type(module).__name__}"


def _options(options: dict[str, object]) -> str:
    return " ".join(f"{name}={value}" for name, value in options.items() if value not in (None, {}))
