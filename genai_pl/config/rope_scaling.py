"""Scaling of rotary positions: the group `model.rope_scaling`."""

from dataclasses import dataclass

from genai_pl.config.enums import RopeKind
from genai_pl.config.values import check_numbers, parse_enums
from genai_pl.errors import ConfigError


@dataclass
class RopeScaling:
    """Scaling of rotary frequencies for texts longer than those of the training (transformers: rope_parameters)."""

    kind: RopeKind = RopeKind.none
    factor: float = 1.0  # new length / length of the training
    original_max_seq_len: int = 8192  # llama3, yarn: context of the training
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn: the ramp begins and ends at whole channels
    attention_factor: float | None = None  # yarn: factor of queries and keys; null: 0.1 ln(factor) + 1

    def __post_init__(self) -> None:
        parse_enums(self, "model.rope_scaling")
        check_numbers(self, "model.rope_scaling")
        if not self.factor >= 1.0:
            raise ConfigError(f"model.rope_scaling.factor must be at least 1, not {self.factor}")
        if not self.high_freq_factor > self.low_freq_factor:
            raise ConfigError("model.rope_scaling.high_freq_factor must be above low_freq_factor")
