"""The names that a model's options may take; each member's value is what YAML and config files say."""

from enum import Enum


class Shape(str, Enum):
    """How blocks are wired."""

    decoder = "decoder"
    encoder = "encoder"
    encoder_decoder = "encoder_decoder"


class Position(str, Enum):
    """Where a token learns its place; relative is T5's, xl is Transformer-XL's as XLNet has it."""

    learned = "learned"
    sinusoidal = "sinusoidal"
    rotary = "rotary"
    alibi = "alibi"
    relative = "relative"
    xl = "xl"


class Norm(str, Enum):
    """Normalization of the residual stream."""

    layernorm = "layernorm"
    rmsnorm = "rmsnorm"


class NormOrder(str, Enum):
    """Before each sub-layer (GPT-2, Llama), after each residual sum (Vaswani et al. 2017), or around it (Gemma 3)."""

    pre = "pre"
    post = "post"
    sandwich = "sandwich"


class Activation(str, Enum):
    """The nonlinearity of the MLP; relu2 is the square of ReLU (So et al. 2021)."""

    relu = "relu"
    relu2 = "relu2"
    gelu = "gelu"
    gelu_tanh = "gelu_tanh"
    silu = "silu"


class Head(str, Enum):
    """What makes logits of hidden states: nothing, a linear layer, or BERT's dense layer and norm before it; or one score."""

    none = "none"
    linear = "linear"
    transform = "transform"
    score = "score"


class AttentionKind(str, Enum):
    """Softmax over all keys that the mask shows, or an approximation for long rows."""

    full = "full"
    window = "window"
    linformer = "linformer"
    performer = "performer"
    reformer = "reformer"


class AttentionBackend(str, Enum):
    """Who computes attention; auto picks by device and says why."""

    auto = "auto"
    triton = "triton"
    sdpa = "sdpa"
    reference = "reference"


class RopeKind(str, Enum):
    """How rotary positions reach beyond the length they were trained on."""

    none = "none"
    linear = "linear"
    llama3 = "llama3"
    yarn = "yarn"
