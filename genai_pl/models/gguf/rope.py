"""Rotary positions in GGUF: metadata of linear and YaRN scaling, and a tensor of factors for Llama 3's."""

import math

import torch
from torch import Tensor

from genai_pl.config.enums import RopeKind
from genai_pl.config.model import ModelConfig
from genai_pl.config.rope_scaling import RopeScaling
from genai_pl.errors import CheckpointError
from genai_pl.models.positions import rotary_frequencies

FACTORS = "rope_freqs.weight"  # (D/2,) what each frequency is divided by
TYPE, FACTOR, ORIGINAL = "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length"
ATTENTION = "rope.scaling.attn_factor"  # beside YaRN's own, 0.1 ln(factor) + 1
LLAMA3 = ("rope.scaling.low_freq_factor", "rope.scaling.high_freq_factor")  # read here; llama.cpp has the tensor
YARN = {"beta_fast": "rope.scaling.yarn_beta_fast", "beta_slow": "rope.scaling.yarn_beta_slow"}
TOLERANCE = 1e-4  # of factors that are stored in float32


def write_scaling(scaling: RopeScaling) -> dict[str, object]:
    """Keys of metadata, without the architecture's name before them."""
    if scaling.kind is RopeKind.none:
        return {}
    if scaling.kind is RopeKind.linear:
        return {TYPE: "linear", FACTOR: scaling.factor}
    if scaling.kind is RopeKind.llama3:
        low, high = LLAMA3
        return {ORIGINAL: scaling.original_max_seq_len, low: scaling.low_freq_factor, high: scaling.high_freq_factor}
    keys = {TYPE: "yarn", FACTOR: scaling.factor, ORIGINAL: scaling.original_max_seq_len}
    keys |= {key: getattr(scaling, field) for field, key in YARN.items()}
    if scaling.attention_factor is not None:
        keys[ATTENTION] = scaling.attention_factor / (0.1 * math.log(scaling.factor) + 1.0)
    return keys


def scaling_factors(config: ModelConfig) -> Tensor | None:
    """The tensor of factors of Llama 3's scaling, (D/2,) float32; None for other kinds."""
    if config.rope_scaling.kind is not RopeKind.llama3:
        return None
    return _factors(config.rope_scaling, config.head_dim, config.rope_theta)


def _factors(scaling: RopeScaling, head_dim: int, theta: float) -> Tensor:
    plain, _ = rotary_frequencies(head_dim, theta, RopeScaling(), torch.device("cpu"))
    scaled, _ = rotary_frequencies(head_dim, theta, scaling, torch.device("cpu"))
    return plain / scaled


def read_scaling(keys: dict[str, object], factors: Tensor | None, *, head_dim: int, theta: float) -> RopeScaling:
    """The scaling of metadata and factors (None: no such tensor); CheckpointError for another kind.

    keys: of metadata, without the architecture's name before them.
    """
    if factors is not None:
        return _read_llama3(keys, factors, head_dim, theta)
    kind = keys.get(TYPE, "none")
    if kind == "none":
        return RopeScaling()
    if kind == "linear":
        return RopeScaling(kind=RopeKind.linear, factor=keys[FACTOR])
    if kind != "yarn":
        raise CheckpointError(f"rotary scaling {kind!r} is not supported; supported: none, linear, yarn, llama3")
    fields = {field: keys[key] for field, key in YARN.items() if key in keys}
    if ATTENTION in keys:
        product = keys[ATTENTION] * (0.1 * math.log(keys[FACTOR]) + 1.0)
        fields["attention_factor"] = float(f"{product:.6g}")  # of two numbers in float32
    original = keys.get(ORIGINAL, keys["context_length"])
    return RopeScaling(kind=RopeKind.yarn, factor=keys[FACTOR], original_max_seq_len=original, **fields)


def _read_llama3(keys: dict[str, object], factors: Tensor, head_dim: int, theta: float) -> RopeScaling:
    """The scaling that gives these factors. Files of others state nothing else: then Llama 3's own numbers are tried."""
    factor = round(factors.max().item(), 4)
    numbers = {"low_freq_factor": keys.get(LLAMA3[0], 1.0), "high_freq_factor": keys.get(LLAMA3[1], 4.0)}
    found = RopeScaling(kind=RopeKind.llama3, factor=factor, original_max_seq_len=keys.get(ORIGINAL, 8192), **numbers)
    if torch.allclose(_factors(found, head_dim, theta), factors.float(), rtol=TOLERANCE):
        return found
    raise CheckpointError(f"the factors in {FACTORS} are not those of Llama 3's scaling, the only one supported")
