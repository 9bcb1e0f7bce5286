"""WrappedConfig: what other folders read of the configuration of a model of transformers, under the names of `ModelConfig`."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from genai_pl.config.enums import AttentionBackend, AttentionKind, Head, Shape

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# families name sizes differently; these are the names in use, the most usual first
N_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_target_positions", "n_ctx")
N_LAYER = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
N_HEAD = ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads")
N_EMBD = ("hidden_size", "d_model", "n_embd", "embed_dim", "embedding_dim")
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
ENDLESS = 2**20  # positions of a model that has no limit: recurrent layers, or distances instead of positions


@dataclass
class WrappedConfig:
    """The fields of `ModelConfig` that other folders read, filled from transformers' configuration.

    values: transformers' configuration as a dict, which is what a checkpoint stores. eos_token_ids: each of them ends a
    text; set where a model is loaded or first trained. logit_factor: the logits are the head's output times this, found by
    `transformers_check`. The other fields are those of `ModelConfig`, with the values that a wrapped model always has.
    """

    vocab_size: int
    max_seq_len: int
    n_layer: int
    n_head: int
    n_embd: int
    n_kv_head: int
    head_dim: int
    init_std: float
    values: dict[str, object]
    attention: AttentionBackend = AttentionBackend.auto
    dropout: float = 0.0
    softcap: float | None = None
    logit_softcap: float | None = None
    logit_factor: float = 1.0
    window: int | None = None
    n_decoder_layer: int | None = None
    n_experts: int | None = None  # whatever transformers' layers are
    shape: Shape = Shape.decoder
    head: Head = Head.linear
    is_reward: bool = False  # its head predicts tokens
    attention_kind: AttentionKind = AttentionKind.full
    tie_embeddings: bool = False
    writes: bool = True
    eos_token_ids: tuple[int, ...] = ()

    @property
    def embedding_size(self) -> int:
        """The width of the embeddings, that of the layers."""
        return self.n_embd

    def to_dict(self) -> dict[str, object]:
        """The content of a checkpoint's model entry; the key `wrapped` tells it from a `ModelConfig`."""
        return {"wrapped": self.values, "eos_token_ids": list(self.eos_token_ids)}


def wrapped_config(inner: "PreTrainedModel", attention: AttentionBackend) -> WrappedConfig:
    """The configuration of a wrapped model; AttributeError where it does not state the sizes of a decoder."""
    values = inner.config.get_text_config(decoder=True)
    n_head, n_embd = _size(values, N_HEAD, default=1), _size(values, N_EMBD)
    return WrappedConfig(
        vocab_size=inner.get_input_embeddings().weight.shape[0],
        max_seq_len=_size(values, N_POSITIONS, default=ENDLESS),
        n_layer=_size(values, N_LAYER),
        n_head=n_head,
        n_embd=n_embd,
        n_kv_head=_size(values, ("num_key_value_heads",), default=n_head),
        init_std=getattr(values, "initializer_range", 0.02),
        head_dim=_size(values, ("head_dim",), default=max(1, n_embd // n_head)),
        values=inner.config.to_dict(),
        attention=attention,
        logit_softcap=next((cap for name in SOFTCAPS if (cap := getattr(values, name, None))), None),
    )


def _size(values: "PreTrainedConfig", names: tuple[str, ...], default: int | None = None) -> int:
    """The first of these fields that is a positive number, else the default; AttributeError without both."""
    for name in names:
        try:
            value = getattr(values, name, None)
        except RuntimeError:  # a size that every layer has for itself
            continue
        if isinstance(value, int) and value > 0:
            return value
    if default is None:
        raise AttributeError(f"{type(values).__name__} has no {names[0]}")
    return default
