"""WrappedDecoder: any causal language model of transformers, with our attention inside and our decoder's interface outside.

The way to fine-tune, serve or evaluate an architecture that has no family here (`model=hf`). Layers, weights and files are
transformers'; packing, backends, caches, virtual tokens and adapters work as with our own decoder.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from genai_pl.config.enums import AttentionBackend, AttentionKind, Head, Shape
from genai_pl.errors import CheckpointError, ConfigError
from genai_pl.kernels import positions_from_segments
from genai_pl.models.hf.transformers_attention import NAME, Packing, register
from genai_pl.models.hf.transformers_check import check, refusal
from genai_pl.models.hf.transformers_sizes import check_counts, check_sizes
from genai_pl.models.kv_cache import WrappedCache
from genai_pl.models.virtual_tokens import VirtualPrefix, VirtualTokens, virtual_prefix
from genai_pl.plugins import ADVICE

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class WrappedConfig:
    """The fields of `ModelConfig` that other folders read, filled from transformers' configuration.

    values: transformers' configuration as a dict, which is what a checkpoint stores. eos_token_ids: each of them ends a
    text; set where a model is loaded or first trained. The other fields are those of `ModelConfig`, with the values that a
    wrapped model always has.
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
    window: int | None = None
    n_decoder_layer: int | None = None
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


class WrappedDecoder(nn.Module):
    """A decoder whose layers are transformers'; segment ids reach our attention as an argument of every layer.

    inner: the model of transformers, built with our attention (`NAME`). attention: the backend. Parameters are named
    `inner.*`. RuntimeError, TypeError or AttributeError where the configuration does not state the sizes of a decoder.
    """

    feature_methods = ("features",)

    def __init__(self, inner: "PreTrainedModel", *, attention: AttentionBackend = AttentionBackend.auto) -> None:
        super().__init__()
        self.inner = inner
        self.transform, self.embed_proj = nn.Identity(), nn.Identity()
        self.virtual: VirtualTokens | None = None
        self.max_length, self.embed_scale, values = None, None, inner.config.get_text_config(decoder=True)
        # families name sizes differently; these are the names that most have
        self.config = WrappedConfig(
            vocab_size=inner.get_input_embeddings().weight.shape[0],
            max_seq_len=values.max_position_embeddings,
            n_layer=values.num_hidden_layers,
            n_head=values.num_attention_heads,
            n_embd=values.hidden_size,
            n_kv_head=getattr(values, "num_key_value_heads", None) or values.num_attention_heads,
            init_std=getattr(values, "initializer_range", 0.02),
            head_dim=getattr(values, "head_dim", None) or values.hidden_size // values.num_attention_heads,
            values=inner.config.to_dict(),
            attention=attention,
            logit_softcap=getattr(values, "final_logit_softcapping", None),
        )

    @property
    def embed(self) -> nn.Embedding:
        """The token embedding."""
        return self.inner.get_input_embeddings()

    @property
    def lm_head(self) -> nn.Linear:
        """The linear layer that gives logits."""
        return self.inner.get_output_embeddings()

    @property
    def blocks(self) -> nn.ModuleList:
        """The layers: the longest list of modules in the model."""
        return max((m for m in self.inner.get_decoder().modules() if isinstance(m, nn.ModuleList)), key=len)

    def forward(self, input_ids: Tensor, segment_ids: Tensor | None = None, **options: object) -> Tensor:
        """Logits (B, T, V)."""
        return self.logits(self.features(input_ids, segment_ids, **options))

    def features(
        self, input_ids: Tensor, segment_ids: Tensor | None = None, *, cache: WrappedCache | None = None
    ) -> Tensor:
        """Hidden states (B, T, C) before the head; with a cache, the T tokens follow those that it holds, and it advances.

        segment_ids (B, T): 0 is padding, 1.. the documents of a packed row; None: each row is one document.
        """
        # segments and positions of all tokens, as in `Decoder.features`
        B, T = input_ids.shape
        past = 0 if cache is None else cache.length
        virtual = self._virtual_prefix(is_first_call=past == 0)
        if cache is not None:
            segment_ids = cache.segments(segment_ids, B, T, input_ids.device)
        if segment_ids is None:
            positions = torch.arange(past + T, device=input_ids.device).expand(B, -1)
        else:
            positions = positions_from_segments(segment_ids)
        segments, positions = virtual.prepend_positions(segment_ids, positions, explicit=False)
        # through transformers' layers
        x = virtual.prepend(self.embed(input_ids))
        n_keys = past + T + (0 if virtual.layers is not None else virtual.n)
        hidden = self.inner.base_model(
            inputs_embeds=x,
            # ones: else transformers looks for packed documents in the positions, and builds masks of its own
            attention_mask=torch.ones(B, n_keys, dtype=torch.long, device=input_ids.device),
            position_ids=positions[:, -x.shape[1] :],
            past_key_values=None if cache is None else cache.inner,
            use_cache=cache is not None,
            packing=Packing(segments, self.config.attention.value, virtual),
        ).last_hidden_state
        if cache is not None:
            cache.length += T
        return hidden[:, virtual.n_queries :]

    def _virtual_prefix(self, *, is_first_call: bool) -> VirtualPrefix:
        """The virtual tokens of this call: embeddings enter once, keys and values every time (transformers' cache lacks them)."""
        virtual = virtual_prefix(self.virtual, is_first_call=True)
        return virtual if is_first_call else virtual._replace(embeddings=None)

    def to_head(self, hidden: Tensor) -> Tensor:
        """The input of `lm_head`: hidden states as they are."""
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., C)."""
        logits = self.lm_head(hidden)
        cap = self.config.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def tie_weights(self) -> None:
        """Tie weights as transformers does."""
        self.inner.tie_weights()

    def new_cache(self, batch_size: int, max_length: int) -> WrappedCache:
        """An empty cache; transformers' grows, whatever the batch size."""
        return WrappedCache(max_length)


def load_wrapped(
    name: str, *, dtype: torch.dtype = torch.float32, attention: AttentionBackend = AttentionBackend.auto
) -> WrappedDecoder:
    """The causal language model of a Hugging Face folder or hub id, checked against transformers, in evaluation mode.

    CheckpointError for files that cannot be read, ConfigError for an architecture that does not run with our attention.
    """
    from transformers import AutoModelForCausalLM

    # read the files
    register()
    try:
        inner, loading_info = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, attn_implementation=NAME, trust_remote_code=False, output_loading_info=True
        )
    except Exception as error:  # anybody's files: transformers and safetensors raise what has no common base
        if NAME in str(error):
            raise refusal(name, "it takes no attention but its own") from None
        advice = ADVICE if "does not recognize this architecture" in str(error) else ""
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{name}: transformers cannot load it ({reason}){advice}") from None
    if loading_info["missing_keys"]:  # transformers would initialize them at random
        raise CheckpointError(f"{name}: tensor {min(loading_info['missing_keys'])} is missing in its files")
    # find the sizes that other folders ask for, and compare with transformers
    try:
        model = WrappedDecoder(inner.eval(), attention=attention)
    # a RuntimeError is a size that every layer has for itself
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        reason = f"its configuration does not give the sizes of a decoder ({str(error).partition('. ')[0]})"
        raise refusal(name, reason) from None
    return check(model, name)


def build_wrapped(
    values: dict[str, object],
    stored: Mapping[str, Tensor] | None = None,
    *,
    attention: AttentionBackend = AttentionBackend.auto,
) -> WrappedDecoder:
    """A wrapped model with new weights, from the configuration in a checkpoint (`values`).

    stored: the checkpoint's weights, which bound the memory that the configuration may ask for. ConfigError for a
    configuration that transformers does not build, or that is larger than them.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    # without memory first: the configuration may come from anyone
    register()
    try:
        config = AutoConfig.for_model(**values)
        if stored is not None:
            check_counts(config.to_dict(), len(stored))
            with torch.device("meta"):
                check_sizes(AutoModelForCausalLM.from_config(config, attn_implementation=NAME), stored)
    except ConfigError:
        raise
    except Exception as error:  # anybody's code, given anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"its configuration is none that transformers builds ({reason})") from None
    inner = AutoModelForCausalLM.from_config(config, attn_implementation=NAME, trust_remote_code=False)
    return WrappedDecoder(inner, attention=attention)


def save_wrapped(model: WrappedDecoder, folder: Path) -> str:
    """Write the model's folder as transformers does; returns the name of the class that reads it."""
    model.inner.save_pretrained(folder)
    return type(model.inner).__name__
