"""Rotary positions as config.json says them: `rope_parameters` (transformers 5), `rope_theta` and `rope_scaling` (before)."""

from genai_pl.errors import ConfigError
from genai_pl.models.families.family import Codec, Values
from genai_pl.names import RopeKind
from genai_pl.specs import ModelConfig, RopeScaling

THEIRS = {  # field of RopeScaling -> key, by kind
    RopeKind.linear: {"factor": "factor"},
    RopeKind.llama3: {
        "factor": "factor",
        "original_max_seq_len": "original_max_position_embeddings",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
    },
    RopeKind.yarn: {
        "factor": "factor",
        "original_max_seq_len": "original_max_position_embeddings",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "attention_factor": "attention_factor",
    },
}
PLAIN = {"partial_rotary_factor": 1.0, "truncate": True}  # further keys, with the only value that is supported
THETA = 10000.0


def read_rope(rope: Values, *, max_seq_len: object = None) -> tuple[float, RopeScaling]:
    """The base of the frequencies and how they are scaled."""
    rope = {key: value for key, value in rope.items() if value is not None}
    theta = rope.pop("rope_theta", THETA)
    name = rope.pop("rope_type", rope.pop("type", "default"))
    rope.pop("type", None)
    kind = next((kind for kind in THEIRS if kind.value == name), None)
    if kind is None and name != "default":
        raise ConfigError(f"rotary positions of rope_type={name!r} are not supported; supported: {_kinds()}")
    keys = THEIRS.get(kind, {})
    strange = [f"{k}={v!r}" for k, v in rope.items() if k not in keys.values() and v != PLAIN.get(k)]
    strange = [] if kind and strange == [f"original_max_position_embeddings={max_seq_len!r}"] else strange
    if strange:
        raise ConfigError(f"rotary positions with {', '.join(strange)} are not supported")
    if kind is None:
        return theta, RopeScaling()
    given = {field: rope[key] for field, key in keys.items() if key in rope}
    if kind is RopeKind.yarn and max_seq_len is not None:
        given.setdefault("original_max_seq_len", max_seq_len)
    return theta, RopeScaling(kind=kind, **given)


def write_rope(theta: float, scaling: RopeScaling) -> dict[str, object]:
    """One entry of rope_parameters."""
    if scaling.kind is RopeKind.none:
        return {"rope_type": "default", "rope_theta": theta}
    said = {key: getattr(scaling, field) for field, key in THEIRS[scaling.kind].items()}
    return {"rope_type": scaling.kind.value, "rope_theta": theta, **{k: v for k, v in said.items() if v is not None}}


def _read(values: Values) -> dict[str, object]:
    rope = {key: values[key] for key in ("rope_theta", "partial_rotary_factor") if key in values}
    rope |= values.get("rope_parameters") or values.get("rope_scaling") or {}
    theta, scaling = read_rope(rope, max_seq_len=values.get("max_position_embeddings"))
    return {"rope_theta": theta, "rope_scaling": scaling}


def _write(config: ModelConfig) -> dict[str, object]:
    rope = write_rope(config.rope_theta, config.rope_scaling)
    said = {"rope_theta": config.rope_theta, "rope_parameters": rope}  # transformers 4 reads the first, 5 the second
    if config.rope_scaling.kind is not RopeKind.none:
        said["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    return said


def _kinds() -> str:
    return ", ".join(["default", *(kind.value for kind in THEIRS)])


ROPE = Codec(_read, _write, ("rope_theta", "rope_parameters", "rope_scaling", "partial_rotary_factor"))


def _read_two(values: Values) -> dict[str, object]:
    """Gemma 3: full layers have one base and the scaling, windowed ones another base."""
    rope = values.get("rope_parameters")
    if not rope:
        full = {"rope_theta": values.get("rope_theta"), **(values.get("rope_scaling") or {})}
        rope = {"full_attention": full, "sliding_attention": {"rope_theta": values.get("rope_local_base_freq")}}
    full = {"rope_theta": 1e6, **{k: v for k, v in rope["full_attention"].items() if v is not None}}
    theta, scaling = read_rope(full)
    local, local_scaling = read_rope(rope["sliding_attention"])
    if local_scaling.kind is not RopeKind.none:
        raise ConfigError("scaled rotary positions in windowed layers are not supported")
    return {"rope_theta": theta, "rope_scaling": scaling, "rope_theta_local": local}


def _write_two(config: ModelConfig) -> dict[str, object]:
    local = config.rope_theta if config.rope_theta_local is None else config.rope_theta_local
    full = write_rope(config.rope_theta, config.rope_scaling)
    rope = {"full_attention": full, "sliding_attention": write_rope(local, RopeScaling())}
    return {"rope_theta": config.rope_theta, "rope_local_base_freq": local, "rope_parameters": rope}


TWO_ROPES = Codec(_read_two, _write_two, ("rope_theta", "rope_local_base_freq", "rope_parameters", "rope_scaling"))
