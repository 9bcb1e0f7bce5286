"""Other models: options of `model` that contradict the model that was loaded, whose own fields count."""

from collections.abc import Iterable, Mapping
from dataclasses import fields

from genai_pl.errors import ConfigError

SIZE_FIELDS = {"shape", "n_layer", "n_decoder_layer", "n_head", "n_kv_head", "n_embd", "intermediate_size", "position"}
FREE_FIELDS = {
    "attention",
    "dropout",
    "max_seq_len",
    "balance_loss",
    "router_z_loss",
}  # fields of `model` that a loaded model takes


def refuse_other_model(
    wanted_config: Mapping[str, object] | object, loaded: object, typed: Iterable[str], *, source: str
) -> None:
    """ConfigError where a typed option of `model` contradicts the model that was loaded, whose own fields count.

    wanted_config: the composed group `model`, with derived sizes. loaded: the loaded model's configuration.
    source: the option that the model came from, for the message. Typing what the model has anyway is allowed,
    as are the fields that a loaded model takes over (attention backend, dropout, context).
    """
    for argument in typed:
        key = argument.partition("=")[0].lstrip("+")
        name = key.removeprefix("model.")
        # a whole group, model=gpt: compare the fields that make a size
        if key == "model":
            differences = [
                f.name
                for f in fields(wanted_config)
                if f.name in SIZE_FIELDS and _differs(wanted_config, loaded, f.name)
            ]
            if differences:
                difference = ", ".join(f"{n}={_value_of(getattr(loaded, n))}" for n in differences[:3])
                raise ConfigError(f"{argument}: has no effect: {source} is another model ({difference}); leave it out")
        elif key == "model.name":
            if not source.endswith(argument.partition("=")[2]):
                raise ConfigError(f"{argument}: has no effect: {source} is what is loaded; leave one of them out")
        elif key.startswith("model.") and name not in FREE_FIELDS and _differs(wanted_config, loaded, name):
            difference = f"has {name}={_value_of(getattr(loaded, name, None))}"
            raise ConfigError(f"{argument}: has no effect: {source} {difference}, and stays as it is; leave it out")


def _differs(wanted_config: object, loaded: object, name: str) -> bool:
    """True if a field is set in one configuration and has another value in the other."""
    return getattr(wanted_config, name, None) is not None and getattr(wanted_config, name) != getattr(
        loaded, name, None
    )


def _value_of(value: object) -> object:
    """The value of an enum's member; anything else as it is."""
    return getattr(value, "value", value)
