"""What a model and a decoding are, as plain data: read from YAML, stored in checkpoints, never code."""

from dataclasses import dataclass, field, fields
from enum import Enum

from genai_pl.errors import ConfigError


class Shape(str, Enum):
    """How blocks are wired."""

    decoder = "decoder"


class Position(str, Enum):
    """Where a token learns its place."""

    learned = "learned"
    sinusoidal = "sinusoidal"
    rotary = "rotary"
    alibi = "alibi"


class Norm(str, Enum):
    """Normalization of the residual stream."""

    layernorm = "layernorm"
    rmsnorm = "rmsnorm"


class NormOrder(str, Enum):
    """Before each sub-layer (GPT-2, Llama) or after each residual sum (Vaswani et al. 2017)."""

    pre = "pre"
    post = "post"


class Activation(str, Enum):
    """The nonlinearity of the MLP; relu2 is the square of ReLU (So et al. 2021)."""

    relu = "relu"
    relu2 = "relu2"
    gelu = "gelu"
    gelu_tanh = "gelu_tanh"
    silu = "silu"


class AttentionBackend(str, Enum):
    """Who computes attention; auto picks by device and says why."""

    auto = "auto"
    triton = "triton"
    sdpa = "sdpa"
    reference = "reference"


@dataclass
class ModelConfig:
    """Everything that determines the shape and the arithmetic of a model; sizes left null are derived."""

    shape: Shape = Shape.decoder
    n_layer: int = 12
    n_head: int = 12
    n_kv_head: int | None = None  # null: n_head (no grouping)
    n_embd: int = 768
    head_dim: int | None = None  # null: n_embd / n_head
    intermediate_size: int | None = None  # null: 4 n_embd, or 8/3 n_embd to a multiple of 32 when gated
    vocab_size: int | None = None  # null: the tokenizer's
    max_seq_len: int = 1024
    position: Position = Position.learned
    rope_theta: float = 10000.0
    norm: Norm = Norm.layernorm
    norm_order: NormOrder = NormOrder.pre
    norm_eps: float = 1e-5
    activation: Activation = Activation.gelu_tanh
    gated_mlp: bool = False
    bias: bool = True  # in every linear layer and LayerNorm
    qkv_bias: bool | None = None  # null: as bias
    qk_norm: bool = False
    tie_embeddings: bool = True
    window: int | None = None  # a token sees this many, itself included
    softcap: float | None = None  # of attention scores
    logit_softcap: float | None = None
    dropout: float = 0.0
    init_std: float = 0.02
    attention: AttentionBackend = AttentionBackend.auto

    def __post_init__(self) -> None:
        self._parse_enums()
        self._check_positive("n_layer", "n_head", "n_kv_head", "n_embd", "head_dim", "intermediate_size", "vocab_size")
        self._check_positive("max_seq_len", "rope_theta", "norm_eps", "window", "softcap", "logit_softcap", "init_std")
        self._derive()
        self._check_pairs()

    def _parse_enums(self) -> None:
        """Let a plain string stand for the enum's member: YAML and notebooks have no other."""
        for option in fields(self):
            if isinstance(option.type, type) and issubclass(option.type, Enum):
                value, names = getattr(self, option.name), [member.value for member in option.type]
                if value not in names:
                    raise ConfigError(f"model.{option.name}={value} is not one of {', '.join(names)}")
                setattr(self, option.name, option.type(value))

    def _check_positive(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int | float) and value > 0):
                raise ConfigError(f"model.{name} must be a number above 0, not {value!r}")

    def _derive(self) -> None:
        if self.n_kv_head is None:
            self.n_kv_head = self.n_head
        if self.qkv_bias is None:
            self.qkv_bias = self.bias
        if self.head_dim is None:
            if self.n_embd % self.n_head:
                raise ConfigError(
                    f"model.n_embd ({self.n_embd}) must be divisible by model.n_head ({self.n_head}); "
                    "change one of them, or set model.head_dim"
                )
            self.head_dim = self.n_embd // self.n_head
        if self.intermediate_size is None:
            self.intermediate_size = 32 * -(-8 * self.n_embd // (3 * 32)) if self.gated_mlp else 4 * self.n_embd

    def _check_pairs(self) -> None:
        if self.n_head % self.n_kv_head:
            raise ConfigError(f"model.n_head ({self.n_head}) must be a multiple of model.n_kv_head ({self.n_kv_head})")
        if self.position is Position.rotary and self.head_dim % 2:
            raise ConfigError(f"model.head_dim ({self.head_dim}) must be even for model.position=rotary")
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"model.dropout must be in [0, 1), not {self.dropout}")
        if self.attention is AttentionBackend.sdpa and self.softcap is not None:
            raise ConfigError("model.attention=sdpa has no softcap: set model.attention=auto, or model.softcap=null")

    def to_dict(self) -> dict[str, object]:
        """The fields as JSON values (enums by name)."""
        return {k: v.value if isinstance(v, Enum) else v for k, v in vars(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, object]) -> "ModelConfig":
        """The configuration that `to_dict` wrote; unknown fields and foreign values are a ConfigError."""
        unknown = set(values) - set(cls.__dataclass_fields__)
        if unknown:
            raise ConfigError(f"unknown model field {min(unknown)!r}")
        try:
            return cls(**values)
        except TypeError as error:
            raise ConfigError(f"bad model configuration: {error}") from None


@dataclass
class GenerationConfig:
    """How tokens are chosen; the order is transformers': repetition penalty, temperature, top-k, top-p, min-p."""

    max_new_tokens: int = 200
    temperature: float = 1.0  # 0: greedy
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    stop: list[str] = field(default_factory=list)  # text that ends a sequence; it is not returned

    def __post_init__(self) -> None:
        checks = {
            "max_new_tokens": self.max_new_tokens >= 1,
            "temperature": self.temperature >= 0,
            "top_k": self.top_k is None or self.top_k >= 1,
            "top_p": self.top_p is None or 0 < self.top_p <= 1,
            "min_p": self.min_p is None or 0 <= self.min_p <= 1,
            "repetition_penalty": self.repetition_penalty > 0,
        }
        for name, holds in checks.items():
            if not holds:
                raise ConfigError(f"generation.{name}={getattr(self, name)} is out of range")
