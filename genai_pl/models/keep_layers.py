"""Layers kept: a shallower model out of some layers of a deeper one, as a student that begins near its teacher.

DistilBERT starts as every second layer of BERT (Sanh et al. 2019, 3).
"""

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from genai_pl.config.enums import Shape
from genai_pl.config.model import ModelConfig
from genai_pl.errors import ConfigError
from genai_pl.models.build import Model
from genai_pl.models.transformer import Transformer


def evenly_spaced(n: int, n_layer: int) -> list[int]:
    """n of n_layer layers at even distances, the first and the last among them.

    >>> evenly_spaced(6, 12)  # those of DistilBERT
    [0, 2, 4, 7, 9, 11]
    """
    if n == 1:
        return [0]
    return [round(i * (n_layer - 1) / (n - 1)) for i in range(n)]


def keep_layers(model: Model, layers: int | Sequence[int]) -> Model:
    """The model with some of its layers, in place: so many at even distances, or those of the given numbers from 0.

    Embeddings, norms and head stay. ConfigError for numbers that it has not, and where the rest would have windows or experts
    in other layers than before.
    """
    config = model.config
    if not isinstance(model, Transformer):
        raise ConfigError("init_layers: takes layers of models of our own, not of those that transformers runs")
    if config.shape is Shape.encoder_decoder or config.share_layers:
        raise ConfigError("init_layers: takes layers of a decoder or an encoder with layers of its own")
    if isinstance(layers, int):
        if not 1 <= layers <= config.n_layer:
            raise ConfigError(f"init_layers={layers}: the model of init_from has {config.n_layer} layers")
        layers = evenly_spaced(layers, config.n_layer)
    numbers = list(layers)
    if not numbers or any(not 0 <= n < config.n_layer for n in numbers) or numbers != sorted(set(numbers)):
        raise ConfigError(
            f"init_layers={numbers}: give rising numbers of layers from 0 to {config.n_layer - 1}, or how many"
        )
    if not config.first_norm and numbers[0] != 0:
        raise ConfigError(f"init_layers={numbers}: the first layer, which has no norm, must be among them")
    kept = replace(config, n_layer=len(numbers), extra=_of_layers(config.extra, config.n_layer, numbers))
    for name in ("full_layers", "mixture_layers"):
        if [n in getattr(config, name) for n in numbers] != [n in getattr(kept, name) for n in range(len(numbers))]:
            what = "windows" if name == "full_layers" else "experts"
            raise ConfigError(f"init_layers={numbers}: other layers would have {what}; keep layers at that distance")
    _set_layers(model, kept, numbers)
    return model


def _set_layers(model: Model, config: ModelConfig, numbers: Sequence[int]) -> None:
    """Leave the model's blocks of these numbers, and the configuration that describes them."""
    for stack in (module for module in model.modules() if isinstance(module, Transformer)):
        stack.blocks = nn.ModuleList(stack.blocks[n] for n in numbers)
        for place, block in enumerate(stack.blocks):
            block.attention.renumber(place)
        stack.windows = [stack.windows[n] for n in numbers]
        stack.config = config
    model.config = config


def _of_layers(extra: dict, n_layer: int, numbers: Sequence[int]) -> dict:
    """Further fields of a config.json, those with a value for each layer for the kept ones alone."""
    return {
        name: [value[n] for n in numbers] if isinstance(value, list) and len(value) == n_layer else value
        for name, value in extra.items()
    }
