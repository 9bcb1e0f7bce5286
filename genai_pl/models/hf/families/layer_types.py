"""Windows by layer in config.json: `layer_types` lists each layer as full or windowed, here every n-th layer is full."""

from collections.abc import Sequence

from genai_pl.config.model import ModelConfig
from genai_pl.errors import ConfigError
from genai_pl.models.hf.families.family import Values

FULL_LAYER, WINDOW_LAYER = "full_attention", "sliding_attention"


def read_windows(values: Values, kinds: Sequence[str], *, period: int = 1) -> dict[str, object]:
    """Fields of ModelConfig for kinds of layers; ConfigError for a list that has no period, or names other kinds.

    period: the layers between full ones where no layer is.
    """
    n = values["num_hidden_layers"]
    if len(kinds) != n or not {*kinds} <= {FULL_LAYER, WINDOW_LAYER}:
        raise ConfigError(f"layer_types={kinds!r} must say {FULL_LAYER} or {WINDOW_LAYER} for each of {n} layers")
    every = [*kinds].index(FULL_LAYER) + 1 if FULL_LAYER in kinds else max(period, n + 1)
    if [kind == FULL_LAYER for kind in kinds] != [(i + 1) % every == 0 for i in range(n)]:
        raise ConfigError(f"layer_types={kinds!r} without a period are not supported")
    if values["sliding_window"] is None and WINDOW_LAYER in kinds:
        raise ConfigError(f"sliding_window=None is not supported where layer_types has {WINDOW_LAYER}")
    return {"window": values["sliding_window"], "full_every": every if values["sliding_window"] else None}


def write_windows(config: ModelConfig) -> dict[str, object]:
    """The keys of config.json for a model with windows; a model without any has only full layers."""
    every = config.full_every or config.n_layer + 1
    full = [config.window is None or (i + 1) % every == 0 for i in range(config.n_layer)]
    return {"sliding_window": config.window, "layer_types": [FULL_LAYER if here else WINDOW_LAYER for here in full]}
