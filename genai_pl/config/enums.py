"""Enumerations of a model's options: each member's value is the word that YAML and config.json use.

The members are strings, so a configuration with enums is JSON as it is, and comparison with a word works.
"""

from enum import Enum


class Shape(str, Enum):
    """Arrangement of the blocks: decoder (causal self-attention), encoder (attends to both sides), encoder_decoder
    (an encoder, and a decoder with cross-attention to it).
    """

    decoder = "decoder"
    encoder = "encoder"
    encoder_decoder = "encoder_decoder"


class Position(str, Enum):
    """Representation of token positions.

    learned, sinusoidal: vectors added to the embeddings (GPT-2; Vaswani et al. 2017). rotary: rotation of
    queries and keys (Su et al. 2021). alibi: a slope on the distance, added to the scores (Press et al. 2022).
    relative: T5's learned bias per bucket of distances (Raffel et al. 2020). xl: Transformer-XL's relative
    scores as in XLNet (Yang et al. 2019).
    """

    learned = "learned"
    sinusoidal = "sinusoidal"
    rotary = "rotary"
    alibi = "alibi"
    relative = "relative"
    xl = "xl"


class Norm(str, Enum):
    """Normalization layer: LayerNorm, or RMSNorm without mean and shift (Zhang and Sennrich 2019)."""

    layernorm = "layernorm"
    rmsnorm = "rmsnorm"


class NormOrder(str, Enum):
    """Place of the normalization: before each sub-layer (GPT-2, Llama), after each residual sum (Vaswani et al.
    2017), or before and after each sub-layer (Gemma 3).
    """

    pre = "pre"
    post = "post"
    sandwich = "sandwich"


class Activation(str, Enum):
    """Nonlinearity of the MLP: gelu is exact, gelu_tanh the approximation of GPT-2, relu2 the square of ReLU (So
    et al. 2021), clamped_swiglu the gate of gpt-oss (OpenAI 2025), for gated MLPs only.
    """

    relu = "relu"
    relu2 = "relu2"
    gelu = "gelu"
    gelu_tanh = "gelu_tanh"
    silu = "silu"
    clamped_swiglu = "clamped_swiglu"


class Head(str, Enum):
    """Layer that maps hidden states to outputs: none (states are the output), linear (C -> V), transform (BERT's
    dense layer, activation and norm, then C -> V), score (C -> n_labels for a text: rewards, classes), tokens
    (C -> n_labels for every token: tags).
    """

    none = "none"
    linear = "linear"
    transform = "transform"
    score = "score"
    tokens = "tokens"

    @property
    def predicts_tokens(self) -> bool:
        """True for language-model heads, whose outputs are tokens of the vocabulary."""
        return self in (Head.linear, Head.transform)

    @property
    def scores(self) -> bool:
        """True for heads whose outputs are labels: of a text or of each token."""
        return self in (Head.score, Head.tokens)


class AttentionKind(str, Enum):
    """Attention over all keys that the mask shows, or an approximation for long rows: a sliding window, a
    projection of keys (Wang et al. 2020), random features (Choromanski et al. 2021), or hashing (Kitaev et al.
    2020).
    """

    full = "full"
    window = "window"
    linformer = "linformer"
    performer = "performer"
    reformer = "reformer"


class AttentionBackend(str, Enum):
    """Implementation of attention. auto picks by device (on a GPU by a probe) and prints why; varlen is torch's kernel for
    packed rows on a GPU; dense holds all weights of a row, fast for short rows of bf16 on a CPU; reference is eager PyTorch
    in fp32, the specification.
    """

    auto = "auto"
    triton = "triton"
    sdpa = "sdpa"
    varlen = "varlen"
    dense = "dense"
    reference = "reference"


class RopeKind(str, Enum):
    """Extension of rotary positions beyond the training length: interpolation (Chen et al. 2023), Llama 3's and
    YaRN's (Peng et al. 2023) scaling by frequency.
    """

    none = "none"
    linear = "linear"
    llama3 = "llama3"
    yarn = "yarn"


class Router(str, Enum):
    """Scores of experts: softmax over all of them (Fedus et al. 2021), or a sigmoid of each (DeepSeek-V3)."""

    softmax = "softmax"
    sigmoid = "sigmoid"
