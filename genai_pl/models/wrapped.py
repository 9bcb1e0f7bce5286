"""Any causal language model of transformers, with our attention in it and the interface of our decoder around it."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from genai_pl.errors import CheckpointError, ConfigError
from genai_pl.kernels import AttentionMask, attention, positions_from_segments
from genai_pl.models.virtual import NOTHING, Front, VirtualTokens, front_of
from genai_pl.models.wrapped_cache import WrappedCache
from genai_pl.names import AttentionBackend, AttentionKind, Head, Shape

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "genai_pl"  # under which transformers knows our attention


class Packing(NamedTuple):
    """What goes through a model of transformers to each attention beside its own arguments."""

    segments: Tensor | None  # (B, S)
    backend: str
    front: Front = NOTHING


@dataclass
class WrappedConfig:
    """What the rest of the code asks of a configuration, read from transformers' own."""

    vocab_size: int
    max_seq_len: int
    n_layer: int
    n_head: int
    n_embd: int
    n_kv_head: int
    head_dim: int
    init_std: float
    values: dict[str, object]  # transformers' configuration
    attention: AttentionBackend = AttentionBackend.auto
    dropout: float = 0.0
    softcap: float | None = None
    logit_softcap: float | None = None
    window: int | None = None
    n_decoder_layer: int | None = None
    shape: Shape = Shape.decoder
    head: Head = Head.linear
    attention_kind: AttentionKind = AttentionKind.full
    tie_embeddings: bool = False
    writes: bool = True
    eos_token_ids: tuple[int, ...] = ()  # each ends a text; found where a model is loaded or begun

    @property
    def embedding_size(self) -> int:
        return self.n_embd

    def to_dict(self) -> dict[str, object]:
        """What a checkpoint stores."""
        return {"wrapped": self.values, "eos_token_ids": list(self.eos_token_ids)}


class WrappedDecoder(nn.Module):
    """A decoder whose layers are transformers'; segment ids reach our attention as an argument of every layer."""

    def __init__(self, inner: "PreTrainedModel", *, attention: AttentionBackend = AttentionBackend.auto) -> None:
        super().__init__()
        self.inner = inner
        self.transform, self.embed_proj = nn.Identity(), nn.Identity()
        self.virtual: VirtualTokens | None = None
        self.max_length, self.embed_scale, values = None, None, inner.config
        self.config = WrappedConfig(
            vocab_size=inner.get_input_embeddings().weight.shape[0],
            max_seq_len=values.max_position_embeddings,
            n_layer=values.num_hidden_layers,
            n_head=values.num_attention_heads,
            n_embd=values.hidden_size,
            n_kv_head=getattr(values, "num_key_value_heads", None) or values.num_attention_heads,
            init_std=getattr(values, "initializer_range", 0.02),
            head_dim=getattr(values, "head_dim", None) or values.hidden_size // values.num_attention_heads,
            values=values.to_dict(),
            attention=attention,
            logit_softcap=getattr(values, "final_logit_softcapping", None),
        )

    @property
    def embed(self) -> nn.Embedding:
        """The embedding of the tokens."""
        return self.inner.get_input_embeddings()

    @property
    def lm_head(self) -> nn.Linear:
        """The layer that makes logits."""
        return self.inner.get_output_embeddings()

    @property
    def blocks(self) -> nn.ModuleList:
        """The layers: the longest list of modules in the model."""
        return max((m for m in self.inner.modules() if isinstance(m, nn.ModuleList)), key=len)

    def forward(self, input_ids: Tensor, segment_ids: Tensor | None = None, **given: object) -> Tensor:
        """Logits (B, T, V)."""
        return self.logits(self.features(input_ids, segment_ids, **given))

    def features(
        self, input_ids: Tensor, segment_ids: Tensor | None = None, *, cache: WrappedCache | None = None
    ) -> Tensor:
        """Hidden states (B, T, C) before the head; with a cache, the T tokens follow what it holds, and it advances."""
        B, T = input_ids.shape
        past = 0 if cache is None else cache.length
        front = self._front(enters=past == 0)
        if cache is not None:
            segment_ids = cache.segments(segment_ids, B, T, input_ids.device)
        if segment_ids is None:
            positions = torch.arange(past + T, device=input_ids.device).expand(B, -1)
        else:
            positions = positions_from_segments(segment_ids)
        segments, positions = front.before(segment_ids, positions, explicit=False)
        x = front.put(self.embed(input_ids))
        n_keys = past + T + (0 if front.layers is not None else front.n)
        hidden = self.inner.base_model(
            inputs_embeds=x,
            # ones: else transformers looks for packed documents in the positions, and builds masks of its own
            attention_mask=torch.ones(B, n_keys, dtype=torch.long, device=input_ids.device),
            position_ids=positions[:, -x.shape[1] :],
            past_key_values=None if cache is None else cache.inner,
            use_cache=cache is not None,
            packing=Packing(segments, self.config.attention.value, front),
        ).last_hidden_state
        if cache is not None:
            cache.length += T
        return hidden[:, front.n_queries :]

    def _front(self, *, enters: bool) -> Front:
        """The virtual tokens: embeddings enter once, keys and values are given again, as transformers' cache has only its own."""
        front = front_of(self.virtual, enters=True)
        return front if enters else front._replace(embeddings=None)

    def to_head(self, hidden: Tensor) -> Tensor:
        """What `lm_head` multiplies."""
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., C)."""
        logits = self.lm_head(hidden)
        cap = self.config.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def tie_weights(self) -> None:
        """As transformers ties them."""
        self.inner.tie_weights()

    def new_cache(self, batch_size: int, max_length: int) -> WrappedCache:
        """An empty cache."""
        return WrappedCache(max_length)


def load_wrapped(
    name: str, *, dtype: torch.dtype = torch.float32, attention: AttentionBackend = AttentionBackend.auto
) -> WrappedDecoder:
    """The causal language model of a Hugging Face folder or hub id, in evaluation mode."""
    from transformers import AutoModelForCausalLM

    register()
    try:
        inner = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, attn_implementation=NAME)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{name}: transformers cannot load it ({str(error).splitlines()[0]})") from None
    return check(WrappedDecoder(inner.eval(), attention=attention), name)


def build_wrapped(values: dict[str, object], *, attention: AttentionBackend = AttentionBackend.auto) -> WrappedDecoder:
    """The same from a configuration as `WrappedConfig.to_dict` stores it, with weights still to be loaded."""
    from transformers import AutoConfig, AutoModelForCausalLM

    register()
    config = AutoConfig.for_model(**values)
    inner = AutoModelForCausalLM.from_config(config, attn_implementation=NAME)
    return WrappedDecoder(inner, attention=attention)


def save_wrapped(model: WrappedDecoder, folder: Path) -> str:
    """Write the folder as transformers does; returns the name of the class that reads it."""
    model.inner.save_pretrained(folder)
    return type(model.inner).__name__


@torch.no_grad()
def check(model: WrappedDecoder, name: str) -> WrappedDecoder:
    """The model, if its logits are a product with its head; ConfigError for the few that do more."""
    tokens = torch.arange(4, device=model.embed.weight.device)[None]
    packing = Packing(None, model.config.attention.value)
    try:
        theirs = model.inner(tokens, attention_mask=torch.ones_like(tokens), packing=packing).logits
    except TypeError as error:  # its code calculates with the mask
        raise ConfigError(f"model.name={name}: this architecture cannot take our attention ({error})") from None
    if (model(tokens) - theirs).abs().max() > 1e-3 * theirs.abs().max():
        raise ConfigError(f"model.name={name}: its head does more than one product, which objectives here rely on")
    return model


def register() -> None:
    """Tell transformers about our attention, and about masks that are rules instead of tensors."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, _rules)


def _rules(
    *, mask_function: object, use_vmap: bool = False, local_size: int | None = None, **_: object
) -> AttentionMask:
    """The mask of a layer; ConfigError for one that is not causal, with or without a window."""
    rules = AttentionMask(causal=True, window=local_size)
    far = 2 * (local_size or 4) + 1
    dense = rules.dense(far, far)[0, 0]
    pairs = [(q, k) for q in (0, far // 2, far - 1) for k in range(far)]
    if use_vmap or any(bool(mask_function(0, 0, torch.tensor(q), torch.tensor(k))) != dense[q, k] for q, k in pairs):
        raise ConfigError("model=hf: this architecture has masks other than causal ones and windows")
    return rules


def _attend(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attention_mask: AttentionMask,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    packing: Packing | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """(B, T, H, D), as transformers' attention functions give it."""
    if packing is None or not isinstance(attention_mask, AttentionMask):
        raise ConfigError("model=hf: this architecture does not hand its arguments on to attention")
    front, window = packing.front, attention_mask.window
    if front.layers is not None:
        new = front.layers[module.layer_idx].to(v.dtype)[:, None].expand(-1, len(k), -1, -1, -1)  # (2, B, K, P, D)
        k, v = torch.cat([new[0], k], dim=2), torch.cat([new[1], v], dim=2)
    shared = None if window is None and packing.segments is None else front.shared
    mask = AttentionMask(causal=attention_mask.causal, window=window, segments=packing.segments, shared=shared)
    options = {"scale": scaling, "softcap": softcap, "dropout_p": dropout, "backend": packing.backend}
    return attention(q, k, v, mask, **options).transpose(1, 2), None
