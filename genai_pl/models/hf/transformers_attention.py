"""Our attention as transformers calls it, with masks that are rules instead of (T, S) tensors.

transformers lets a library register an attention function and a mask function under a name. Ours are called for every
layer of a model built with that name. Segments of packed rows, the backend and virtual tokens reach the layers as one
extra keyword (`packing`), which models hand through to attention. An architecture that calls either with arguments that
we do not compute with is refused, not run wrong.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from genai_pl.errors import ConfigError
from genai_pl.kernels import AttentionMask, attention
from genai_pl.models.virtual_tokens import NO_PREFIX, VirtualPrefix

NAME = "genai_pl"  # of our attention in transformers
# arguments that some layers pass to every attention function, and that transformers' own ignore too
INERT = {
    "is_causal",  # in the mask
    "sliding_window",  # likewise
    "position_ids",  # already in the queries and keys
    "use_cache",
    "output_attentions",  # never requested here
}
# arguments of the mask function: sizes repeat those of queries and keys, and our padding mask is all ones
INERT_IN_MASKS = {
    "batch_size",
    "q_length",
    "q_offset",
    "kv_offset",
    "attention_mask",
    "allow_is_causal_skip",
    "allow_is_bidirectional_skip",
    "dtype",
    "device",
}


class Packing(NamedTuple):
    """The keyword that passes through a model of transformers to each attention: documents, backend, virtual tokens."""

    segments: Tensor | None  # (B, S), 0 is padding; None: each row is one document
    backend: str  # a name of `kernels.BACKENDS`
    virtual: VirtualPrefix = NO_PREFIX


def register() -> None:
    """Register our attention and mask functions with transformers, under NAME; safe to repeat."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, rules)


def rules(
    *,
    mask_function: object,
    config: object,
    use_vmap: bool = False,
    local_size: int | None = None,
    kv_length: int = 0,
    **extra: object,
) -> AttentionMask | None:
    """The mask of a kind of layer as a rule, if it is causal, with or without a window; else None, which `attend` refuses.

    mask_function(b, h, query, key) is transformers' own rule, of which only code is known: it is compared with causal and
    windowed masks at the first, the middle and the last query. None is no error yet, as some models make masks that no
    layer uses.
    """
    refuse_unknown(config.model_type, "a mask", extra, INERT_IN_MASKS)
    if use_vmap or local_size == 0:
        return None
    # far enough that a window, a chunk or a global token would show
    far = max(2 * (local_size or 4), kv_length)
    key = torch.arange(far + 1)
    query = torch.tensor([[0], [far // 2], [far]])
    expected = (key <= query) if local_size is None else (key <= query) & (query - key < local_size)
    try:
        is_ours = torch.equal(mask_function(0, 0, query, key).expand_as(expected), expected)
    except (RuntimeError, IndexError):  # a rule that reads more than positions
        is_ours = False
    return AttentionMask(causal=True, window=local_size) if is_ours else None


def attend(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attention_mask: AttentionMask,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    packing: Packing | None = None,
    **extra: object,
) -> tuple[Tensor, None]:
    """Attention (B, T, H, D) with the signature of transformers' attention functions; ConfigError for unknown arguments.

    q (B, H, T, D), k and v (B, K, S, D). attention_mask: what `rules` gave. scaling, dropout, softcap: as in `attention`;
    s_aux: its sinks.
    """
    refuse_unknown(type(module).__name__, "attention", extra, INERT)
    if packing is None:
        raise ConfigError(f"{type(module).__name__} does not hand its arguments on to attention")
    if not isinstance(attention_mask, AttentionMask):
        raise ConfigError(f"{type(module).__name__} has masks other than causal ones and windows")
    # virtual tokens: keys and values before the others, seen by every document
    virtual, window = packing.virtual, attention_mask.window
    if virtual.layers is not None:
        virtual_kv = (
            virtual.layers[module.layer_idx].to(v.dtype)[:, None].expand(-1, len(k), -1, -1, -1)
        )  # (2, B, K, P, D)
        k, v = torch.cat([virtual_kv[0], k], dim=2), torch.cat([virtual_kv[1], v], dim=2)
    global_prefix = None if window is None and packing.segments is None else virtual.global_prefix
    mask = AttentionMask(
        causal=attention_mask.causal, window=window, segments=packing.segments, global_prefix=global_prefix
    )
    options = {"scale": scaling, "softcap": softcap, "sinks": s_aux, "dropout_p": dropout}
    return attention(q, k, v, mask, **options, backend=packing.backend).transpose(1, 2), None


def refuse_unknown(architecture: str, to: str, arguments: dict[str, object], known: set[str]) -> None:
    """ConfigError for an argument with a value that is not `known`: it would change numbers that we do not change."""
    unknown = sorted(name for name, value in arguments.items() if name not in known and value is not None)
    if unknown:
        raise ConfigError(f"{architecture} gives {to} {', '.join(unknown)}, which ours does not take")
