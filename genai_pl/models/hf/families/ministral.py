"""Ministral: Mistral with a window in some layers, which transformers also makes of a Mistral that lists kinds of layers."""

from dataclasses import replace

from genai_pl.models.hf.families.decoders import CAUSAL, MISTRAL
from genai_pl.models.hf.families.family import Codec, Values
from genai_pl.models.hf.families.layer_types import FULL_LAYER, WINDOW_LAYER, read_windows, write_windows
from genai_pl.models.hf.families.rope import ROPE


def kind_of(values: Values) -> object:
    """The model_type that AutoConfig takes for a config.json."""
    kind = values["model_type"]
    return MINISTRAL.model_type if kind == MISTRAL.model_type and "layer_types" in values else kind


def _read_windows(values: Values) -> dict[str, object]:
    """A window in every layer where config.json does not list them."""
    kinds, usual = values.get("layer_types"), FULL_LAYER if values["sliding_window"] is None else WINDOW_LAYER
    return read_windows(values, [usual] * values["num_hidden_layers"] if kinds is None else kinds)


MINISTRAL = replace(
    MISTRAL,
    model_type="ministral",
    architectures={
        head: tuple(name.replace("Mistral", kind) for kind in ("Ministral", "Mistral") for name in names)
        for head, names in MISTRAL.architectures.items()
    },
    fields={field: key for field, key in MISTRAL.fields.items() if field != "window"},
    codecs=(ROPE, CAUSAL, Codec(_read_windows, write_windows, ("layer_types", "sliding_window"))),
)
