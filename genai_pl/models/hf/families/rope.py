"""Rotary positions in config.json: `rope_parameters` (transformers 5), `rope_theta` and `rope_scaling` (before)."""

import math

from genai_pl.config.enums import RopeKind
from genai_pl.config.model import ModelConfig
from genai_pl.config.rope_scaling import RopeScaling
from genai_pl.errors import ConfigError
from genai_pl.models.hf.families.family import Codec, Values

HF_KEYS = {  # field of RopeScaling -> key, by kind
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
        "truncate": "truncate",
    },
}
PLAIN = {
    "partial_rotary_factor": 1.0,
    "truncate": True,
}  # further keys, with the only value that is supported, or the usual
THETA = 10000.0  # where config.json has no base


NEEDED = {  # keys without a default
    RopeKind.linear: ("factor",),
    RopeKind.llama3: ("factor", "low_freq_factor", "high_freq_factor"),
    RopeKind.yarn: ("factor",),
}


def read_rope(rope: Values, *, theta: float, values: Values) -> tuple[float, RopeScaling]:
    """The base of the frequencies and their scaling, from one entry of rotary parameters.

    theta: the base where the entry has none. values: config.json, which may hold the original context length. ConfigError
    for a kind or key that would turn queries otherwise than we do.
    """
    rope = dict(rope)
    theta = rope.pop("rope_theta", theta)
    if theta is None:
        raise ConfigError("rope_theta=None is not supported")
    other = rope.pop("type", "default")
    name = rope.pop("rope_type", other)
    rope = {key: value for key, value in rope.items() if value is not None}
    if name == RopeKind.yarn.value:
        rope = _with_mscale(rope)
    kind = next((kind for kind in HF_KEYS if kind.value == name), None)
    if kind is None and name != "default":
        raise ConfigError(f"rotary positions of rope_type={name!r} are not supported; supported: {_kinds()}")
    # every key must be one that this kind uses, or have the one supported value
    keys = HF_KEYS.get(kind, {})
    ignored = "original_max_position_embeddings" if kind in (None, RopeKind.linear) else ""
    unknown = [f"{k}={v!r}" for k, v in rope.items() if k not in (*keys.values(), ignored) and v != PLAIN.get(k)]
    if unknown:
        raise ConfigError(f"rotary positions with {', '.join(unknown)} are not supported")
    if kind is None:
        return theta, RopeScaling()
    missing = [key for key in NEEDED[kind] if key not in rope]
    if missing:
        raise ConfigError(f"rotary positions of rope_type={name!r} without {', '.join(missing)} are not supported")
    fields = {field: rope[key] for field, key in keys.items() if key in rope}
    if "original_max_seq_len" in keys:
        length = fields.get("original_max_seq_len", values["max_position_embeddings"])
        fields["original_max_seq_len"] = values.get("original_max_position_embeddings", length)
    return theta, RopeScaling(kind=kind, **fields)


def _with_mscale(rope: dict[str, object]) -> dict[str, object]:
    """YaRN's keys with the quotient of DeepSeek's two factors of queries and keys as one, as transformers takes it."""
    rest = dict(rope)
    scales = [rest.pop(key, None) for key in ("mscale", "mscale_all_dim")]
    if not all(scales) or "attention_factor" in rope or "factor" not in rope:
        return rest
    first, second = (0.1 * scale * math.log(max(rope["factor"], 1.0)) + 1.0 for scale in scales)
    return {**rest, "attention_factor": first / second}


def write_rope(theta: float, scaling: RopeScaling) -> dict[str, object]:
    """The entry of rope_parameters for a base and a scaling."""
    if scaling.kind is RopeKind.none:
        return {"rope_type": "default", "rope_theta": theta}
    entry = {key: getattr(scaling, field) for field, key in HF_KEYS[scaling.kind].items()}
    stated = {key: value for key, value in entry.items() if value is not None and value is not PLAIN.get(key)}
    return {"rope_type": scaling.kind.value, "rope_theta": theta, **stated}


def _read(values: Values) -> dict[str, object]:
    rope = {"partial_rotary_factor": values.get("partial_rotary_factor")}
    rope |= values.get("rope_scaling") or values.get("rope_parameters") or {}  # in transformers' order
    theta, scaling = read_rope(rope, theta=values.get("rope_theta", THETA), values=values)
    return {"rope_theta": theta, "rope_scaling": scaling}


def _write(config: ModelConfig) -> dict[str, object]:
    rope = write_rope(config.rope_theta, config.rope_scaling)
    entry = {"rope_theta": config.rope_theta, "rope_parameters": rope}  # transformers 4 reads the first, 5 the second
    if config.rope_scaling.kind is not RopeKind.none:
        entry["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    return entry


def _kinds() -> str:
    return ", ".join(["default", *(kind.value for kind in HF_KEYS)])


KEYS = ("rope_theta", "rope_parameters", "rope_scaling", "partial_rotary_factor", "original_max_position_embeddings")
ROPE = Codec(_read, _write, KEYS)


def _read_two(values: Values) -> dict[str, object]:
    """Gemma 3: full layers have one base and the scaling, windowed ones another base without scaling."""
    rope = values.get("rope_parameters") or {}
    full = {**(rope.get("full_attention") or {}), **(values.get("rope_scaling") or {})}
    common = {"partial_rotary_factor": values.get("partial_rotary_factor")}
    theta, scaling = read_rope(common | full, theta=values.get("rope_theta", 1e6), values=values)
    base = values.get("rope_local_base_freq", THETA)
    local, local_scaling = read_rope(common | (rope.get("sliding_attention") or {}), theta=base, values=values)
    if local_scaling.kind is not RopeKind.none:
        raise ConfigError("scaled rotary positions in windowed layers are not supported")
    return {"rope_theta": theta, "rope_scaling": scaling, "rope_theta_local": local}


def _write_two(config: ModelConfig) -> dict[str, object]:
    local = config.rope_theta if config.rope_theta_local is None else config.rope_theta_local
    full = write_rope(config.rope_theta, config.rope_scaling)
    rope = {"full_attention": full, "sliding_attention": write_rope(local, RopeScaling())}
    return {"rope_theta": config.rope_theta, "rope_local_base_freq": local, "rope_parameters": rope}


TWO_ROPES = Codec(_read_two, _write_two, (*KEYS, "rope_local_base_freq"))
