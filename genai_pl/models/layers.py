"""Layers: normalization, the two MLPs, BERT's head and RoBERTa's position embedding, the small parts of a Transformer.

Shapes here are (..., C): none of them looks at other tokens. Names of submodules are keys of checkpoints.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genai_pl.config.enums import Activation, Norm
from genai_pl.config.model import ModelConfig


class ReLU2(nn.Module):
    """max(0, x)^2, the activation of Primer (So et al. 2021)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x).square()


class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight over the last channels, in the precision of the weight (Zhang and Sennrich 2019, eq. 4).

    LayerNorm without mean and bias. The result is float32 under autocast too, because the weight is.
    """

    def forward(self, x: Tensor) -> Tensor:
        # under autocast a projection hands over bf16: torch fuses one dtype only, and warns of two
        return super().forward(x.to(self.weight.dtype))


def build_norm(config: ModelConfig, size: int) -> nn.Module:
    """RMSNorm or LayerNorm over the last `size` channels, as `config.norm` says; LayerNorm has a bias if `config.bias`."""
    if config.norm is Norm.rmsnorm:
        return RMSNorm(size, eps=config.norm_eps)
    return nn.LayerNorm(size, eps=config.norm_eps, bias=config.bias)


class GLU(nn.Module):
    """act(gate) * up of two (..., F), the hidden channels of a gated MLP (Shazeer 2020, eq. 5)."""

    def __init__(self, activation: Activation) -> None:
        super().__init__()
        self.activation = build_activation(activation)

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        return self.activation(gate) * up


class ClampedSwiGLU(nn.Module):
    """g sigmoid(alpha g) (u + 1) of two (..., F), g = min(gate, limit), u up within +-limit (gpt-oss, OpenAI 2025)."""

    def __init__(self, *, alpha: float, limit: float) -> None:
        super().__init__()
        self.alpha, self.limit = alpha, limit

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return gate * torch.sigmoid(self.alpha * gate) * (up + 1)


def build_glu(config: ModelConfig) -> nn.Module:
    """The module (gate, up) -> hidden channels of a gated MLP, by the configuration's activation."""
    if config.activation is Activation.clamped_swiglu:
        return ClampedSwiGLU(alpha=config.swiglu_alpha, limit=config.swiglu_limit)
    return GLU(config.activation)


def build_activation(activation: Activation) -> nn.Module:
    """The activation module of a name; `gelu_tanh` is the approximation that GPT-2 was trained with."""
    return {
        Activation.relu: nn.ReLU,
        Activation.relu2: ReLU2,
        Activation.gelu: nn.GELU,
        Activation.gelu_tanh: lambda: nn.GELU(approximate="tanh"),
        Activation.silu: nn.SiLU,
    }[activation]()


class MLP(nn.Module):
    """down(act(up(x))), (B, T, C) -> (B, T, C) over F hidden channels (Vaswani et al. 2017, eq. 2).

    size: F; None: the configuration's.
    """

    def __init__(self, config: ModelConfig, size: int | None = None) -> None:
        super().__init__()
        size = config.intermediate_size if size is None else size
        self.up_proj = nn.Linear(config.n_embd, size, bias=config.bias)
        self.down_proj = nn.Linear(size, config.n_embd, bias=config.bias)
        self.activation = build_activation(config.activation)

    @property
    def column_layers(self) -> list[nn.Module]:
        """Column-parallel layers of tensor parallelism (Megatron): outputs split by hidden channel."""
        return [self.up_proj]

    @property
    def row_layers(self) -> list[nn.Module]:
        """Row-parallel layer of tensor parallelism (Megatron): inputs split by hidden channel."""
        return [self.down_proj]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.up_proj(x)))


class GatedMLP(nn.Module):
    """down(glu(gate(x), up(x))), (B, T, C) -> (B, T, C) (Shazeer 2020, eq. 6): SwiGLU with silu, GEGLU with gelu.

    Three matrices instead of two: for an equal number of parameters F is two thirds of a plain MLP's. size: F; None: the
    configuration's.
    """

    def __init__(self, config: ModelConfig, size: int | None = None) -> None:
        super().__init__()
        size = config.intermediate_size if size is None else size
        self.gate_proj = nn.Linear(config.n_embd, size, bias=config.bias)
        self.up_proj = nn.Linear(config.n_embd, size, bias=config.bias)
        self.down_proj = nn.Linear(size, config.n_embd, bias=config.bias)
        self.glu = build_glu(config)

    @property
    def column_layers(self) -> list[nn.Module]:
        """Column-parallel layers of tensor parallelism (Megatron): outputs split by hidden channel."""
        return [self.gate_proj, self.up_proj]

    @property
    def row_layers(self) -> list[nn.Module]:
        """Row-parallel layer of tensor parallelism (Megatron): inputs split by hidden channel."""
        return [self.down_proj]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.glu(self.gate_proj(x), self.up_proj(x)))


class HeadTransform(nn.Module):
    """norm(act(dense(x))), (..., C) to the width of the embeddings: the part of BERT's masked-LM head before its matrix."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.n_embd, config.embedding_size, bias=config.transform_bias)
        self.activation = build_activation(config.activation)
        self.norm = build_norm(config, config.embedding_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.activation(self.dense(x)))


class OffsetEmbedding(nn.Embedding):
    """Learned positions in a table whose first `offset` rows no token uses.

    RoBERTa numbers positions from its padding token's id + 1 on, and its checkpoints hold the unused rows.
    """

    def __init__(self, n_positions: int, width: int, *, offset: int) -> None:
        super().__init__(offset + n_positions, width)
        self.offset = offset

    def forward(self, positions: Tensor) -> Tensor:
        return super().forward(positions + self.offset)


class Pooler(nn.Module):
    """BERT's dense layer (C, C) over the first state, of no use to any objective here: kept so that a folder is written whole."""

    def __init__(self, width: int) -> None:
        super().__init__()
        # buffers: no gradient ever reaches them, no adapter wraps them and no optimizer decays them
        self.register_buffer("weight", torch.zeros(width, width))
        self.register_buffer("bias", torch.zeros(width))
