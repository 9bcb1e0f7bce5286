"""WrappedDecoder: any causal language model of transformers behind our decoder's interface, with our attention where it fits.

The way to fine-tune, serve or evaluate an architecture that has no family here (`model=hf`). Layers, weights and files are
transformers'; packing, backends, caches, virtual tokens and adapters work as with our own decoder. `transformers_check.py`
finds out on which `Route` a model computes exactly what transformers computes.
"""

import inspect
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from genai_pl.config.enums import AttentionBackend
from genai_pl.distributed.context_group import ALONE
from genai_pl.errors import CheckpointError, ConfigError
from genai_pl.kernels import positions_from_segments
from genai_pl.models.hf.transformers_attention import NAME, Packing, register
from genai_pl.models.hf.transformers_cache import WrappedCache, new_inner_cache
from genai_pl.models.hf.transformers_check import check, reason_of, refusal
from genai_pl.models.hf.transformers_config import WrappedConfig, wrapped_config
from genai_pl.models.hf.transformers_quantized import reader
from genai_pl.models.hf.transformers_rope import length_rope
from genai_pl.models.hf.transformers_rows import document_rows
from genai_pl.models.hf.transformers_sizes import check_counts, check_folder, check_sizes
from genai_pl.models.virtual_tokens import VirtualPrefix, VirtualTokens, virtual_prefix
from genai_pl.plugins import ADVICE

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

log = logging.getLogger(__name__)

SENSES = re.compile("vision|image|audio")  # in names of modules that read no text


@dataclass(frozen=True)
class Route:
    """How a model is called, so that it computes what transformers computes for each text alone.

    ours              attention is `kernels.attention`; else transformers' own
    masks_documents   documents and padding of a row are told apart by the mask; else each document gets a row of its own
    caches            tokens follow transformers' cache; else each call computes the whole text again
    caches_padding    those of rows that begin with padding do, too
    takes_embeddings  layers read embeddings alone; else they need the tokens, and virtual tokens have none
    notes             a line for the log on each of these that is False, with the reason
    """

    ours: bool = True
    masks_documents: bool = True
    caches: bool = True
    caches_padding: bool = True
    takes_embeddings: bool = True
    notes: tuple[str, ...] = ()


class WrappedDecoder(nn.Module):
    """A decoder whose layers are transformers'; segment ids reach our attention as an argument of every layer.

    inner: the model of transformers. attention: the backend. own_attention: the reason why transformers built it with its own
    attention instead of ours (`NAME`), or None. Parameters are named `inner.*`. AttributeError where the configuration does
    not state the sizes of a decoder.
    """

    feature_methods = ("features",)
    context_group = ALONE

    def __init__(
        self,
        inner: "PreTrainedModel",
        *,
        attention: AttentionBackend = AttentionBackend.auto,
        own_attention: str | None = None,
    ) -> None:
        super().__init__()
        self.inner = inner
        self.transform, self.embed_proj = nn.Identity(), nn.Identity()
        self.virtual: VirtualTokens | None = None
        self.max_length, self.embed_scale = None, None
        self.config: WrappedConfig = wrapped_config(inner, attention)
        self.route = Route()
        self._length_rope = length_rope(inner)
        # the arguments that the layers' `forward` names; None where it takes any
        parameters = inspect.signature(self.stack.forward).parameters
        is_open = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        self._takes = None if is_open else set(parameters)
        # the cache: `cache` since transformers 5.24, before it past_key_values, and cache_params of Mamba and its like
        self._cache_name = next((n for n in ("cache", "cache_params") if n in parameters), "past_key_values")
        has_positions = "position_ids" in parameters
        self._recurrent = self._cache_name != "past_key_values" and inner._is_stateful and not has_positions
        if own_attention is not None:
            self.leave_attention(own_attention)

    @property
    def embed(self) -> nn.Embedding:
        """The token embedding."""
        return self.inner.get_input_embeddings()

    @property
    def lm_head(self) -> nn.Linear:
        """The linear layer that gives logits."""
        return self.inner.get_output_embeddings()

    @property
    def stack(self) -> nn.Module:
        """The model without its head: transformers' base model, or the first part where a class names none of its own."""
        base = self.inner.base_model
        return next(self.inner.children()) if base is self.inner else base

    @property
    def blocks(self) -> nn.ModuleList:
        """The layers: the longest list of modules in the model, an encoder of images or sounds left out."""
        lists = [(n, m) for n, m in self.inner.get_decoder().named_modules() if isinstance(m, nn.ModuleList)]
        return max((m for name, m in lists if not SENSES.search(name)), key=len)

    def leave_attention(self, reason: str) -> None:
        """Let transformers compute attention; its masks know no documents, so that each gets a row of its own."""
        implementation = "sdpa" if type(self.inner)._supports_sdpa else "eager"
        for module in self.inner.modules():
            if getattr(getattr(module, "config", None), "_attn_implementation", None) == NAME:
                module.config._attn_implementation = implementation
        notes = (*self.route.notes, f"transformers computes attention: {reason}")
        self.route = Route(ours=False, masks_documents=False, notes=notes)

    def forward(self, input_ids: Tensor, segment_ids: Tensor | None = None, **options: object) -> Tensor:
        """Logits (B, T, V)."""
        return self.logits(self.features(input_ids, segment_ids, **options))

    def features(
        self, input_ids: Tensor, segment_ids: Tensor | None = None, *, cache: WrappedCache | None = None
    ) -> Tensor:
        """Hidden states (B, T, C) before the head; with a cache, the T tokens follow those that it holds, and it advances.

        segment_ids (B, T): 0 is padding, 1.. the documents of a packed row; None: each row is one document.
        """
        if cache is not None:
            return self._continue(input_ids, segment_ids, cache)
        if self._length_rope is not None and self._length_rope.is_exceeded(segment_ids, self.virtual):
            return self._length_rope.each_alone(lambda text: self._pass(text, None), input_ids, segment_ids)
        if segment_ids is None or self.route.masks_documents:
            return self._pass(input_ids, segment_ids)
        rows = document_rows(segment_ids)
        return rows.join(self._pass(rows.split(input_ids), None))

    def _continue(self, input_ids: Tensor, segment_ids: Tensor | None, cache: WrappedCache) -> Tensor:
        """Hidden states (B, T, C) of tokens that follow those of the cache."""
        past, T = cache.length, input_ids.shape[1]
        tokens, segments = cache.extend(input_ids, segment_ids)
        if self._length_rope is not None and cache.length > self._length_rope.limit:
            cache.inner = None  # the keys of earlier tokens have other positions
            return self.features(tokens, segments)[:, -T:]
        if cache.inner is not None:
            return self._pass(input_ids, segments, cache=cache.inner, past=past)
        # the first tokens, or all of them again; documents beside each other have no common state
        route = self.route
        is_packed = segments is not None and not route.masks_documents and int(segments.max()) > 1
        is_padded = segments is not None and not route.caches_padding and not bool(segments.all())
        if is_packed or is_padded or not route.caches:
            return self.features(tokens, segments)[:, -T:]
        cache.inner = new_inner_cache(self.inner, keeps_all=self.route.ours)
        return self._pass(tokens, segments, cache=cache.inner)[:, -T:]

    def _pass(
        self,
        input_ids: Tensor,
        segments: Tensor | None,
        *,
        cache: "Cache | None" = None,
        past: int = 0,
        embedded: bool = False,
    ) -> Tensor:
        """Hidden states (B, T, C) of the last T of past + T tokens, through transformers' layers.

        segments (B, past + T). embedded: give layers embeddings even where they could have the tokens.
        """
        if self._length_rope is not None:
            self._length_rope.reset()
        # segments and positions of all tokens, as in `Decoder.features`
        B, T = input_ids.shape
        virtual = self._virtual_prefix(is_first_call=past == 0)
        if segments is None:
            positions = torch.arange(past + T, device=input_ids.device).expand(B, -1)
        else:
            positions = positions_from_segments(segments)
        all_segments, positions = virtual.prepend_positions(segments, positions, explicit=False)
        # ones: else transformers looks for packed documents in the positions, and builds masks of its own
        n_keys = past + T + (0 if virtual.layers is not None else virtual.n)
        visible = torch.ones(B, n_keys, dtype=torch.long, device=input_ids.device)
        if segments is not None:  # recurrent layers skip padding, and our attention has it in its mask
            visible[:, -segments.shape[1] :] = segments != 0
        # through transformers' layers
        if embedded or virtual.embeddings is not None:
            x = virtual.prepend(self.embed(input_ids))
            inputs, n_queries = {"inputs_embeds": x}, x.shape[1]
        else:
            inputs, n_queries = {"input_ids": input_ids}, T
        options = {
            "attention_mask": visible,
            "position_ids": positions[:, -n_queries:],
            self._cache_name: cache,
            "use_cache": cache is not None,
        }
        if self._recurrent:  # no attention, so that a mask is for the new tokens alone
            options["attention_mask"] = visible if past == 0 else None
        if self.route.ours:
            options["packing"] = Packing(all_segments, self.config.attention.value, virtual)
        taken = {name: value for name, value in options.items() if self._takes is None or name in self._takes}
        hidden = self.stack(**inputs, **taken).last_hidden_state
        return hidden[:, virtual.n_queries :]

    def _virtual_prefix(self, *, is_first_call: bool) -> VirtualPrefix:
        """The virtual tokens of this call: embeddings enter once, keys and values every time (transformers' cache lacks them)."""
        virtual = virtual_prefix(self.virtual, is_first_call=True)
        self.refuse_virtual(layers=virtual.layers is not None, embeddings=virtual.embeddings is not None)
        return virtual if is_first_call else virtual._replace(embeddings=None)

    def refuse_virtual(self, *, layers: bool, embeddings: bool) -> None:
        """ConfigError for virtual tokens that this route has no place for: keys of layers, or embeddings."""
        if layers and not self.route.ours:
            raise ConfigError(f"peft=prefix gives keys to our attention, and {self.route.notes[0]}; choose peft=lora")
        if embeddings and not self.route.takes_embeddings:
            raise ConfigError(f"peft=prompt gives embeddings, and {self.route.notes[-1]}; choose peft=lora")

    def to_head(self, hidden: Tensor) -> Tensor:
        """The input of `lm_head`: hidden states, times the factor that some families give their logits."""
        return hidden if self.config.logit_factor == 1.0 else hidden * self.config.logit_factor

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., C)."""
        logits = self.lm_head(self.to_head(hidden))
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

    CheckpointError for files that cannot be read, ConfigError for an architecture that computes something else here.
    """

    # read the files
    def read(**implementation: str | None) -> tuple:
        return from_pretrained(
            dtype=dtype,
            trust_remote_code=False,
            output_loading_info=True,
            **implementation,
        )

    try:
        check_folder(Path(name))
        from_pretrained = reader(name)
        (inner, loading_info), own_attention = _with_our_attention(read)
    except CheckpointError:
        raise
    except ConfigError as error:
        raise CheckpointError(f"{name}: {error}") from None
    except Exception as error:  # anybody's files: transformers and safetensors raise what has no common base
        advice = ADVICE if "does not recognize this architecture" in str(error) else ""
        raise CheckpointError(f"{name}: transformers cannot load it ({reason_of(error)}){advice}") from None
    if loading_info["missing_keys"]:  # transformers would initialize them at random
        raise CheckpointError(f"{name}: tensor {min(loading_info['missing_keys'])} is missing in its files")
    _forget_quantization(inner)
    # find the sizes that other folders ask for, and compare with transformers
    try:
        model = WrappedDecoder(inner.eval(), attention=attention, own_attention=own_attention)
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        reason = f"its configuration does not give the sizes of a decoder ({str(error).partition('. ')[0]})"
        raise refusal(name, reason) from None
    check(model, name)
    for note in model.route.notes:
        log.info("model       %s: %s", name, note)
    return model


def _with_our_attention(build: Callable) -> tuple[object, str | None]:
    """What `build` makes with our attention, or, for a class that refuses it, with its own, and then the reason."""
    register()
    try:
        return build(attn_implementation=NAME), None
    except Exception as error:  # a table of classes without ours: a KeyError, or whatever the family makes of it
        if NAME not in str(error):
            raise
    return build(attn_implementation=None), "its classes take no other"


def _forget_quantization(inner: "PreTrainedModel") -> None:
    """Let transformers save a model, whose quantized tensors it has read as plain numbers, as it saves any other.

    It would give them the names of quantized ones, which no class finds again (transformers 5.23).
    """
    conversions = getattr(inner, "_weight_conversions", None) or ()
    operations = [type(step) for conversion in conversions for step in getattr(conversion, "operations", ())]
    if any(step.__module__.startswith("transformers.integrations") for step in operations):
        inner._weight_conversions = None  # those of the class


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
    try:
        config = AutoConfig.for_model(**values)
        build = partial(AutoModelForCausalLM.from_config, config)
        if stored is not None:
            check_counts(config.to_dict(), len(stored))
            with torch.device("meta"):
                check_sizes(_with_our_attention(build)[0], stored)
    except ConfigError:
        raise
    except Exception as error:  # anybody's code, given anything
        reason = reason_of(error)
        raise ConfigError(f"its configuration is none that transformers builds ({reason})") from None
    inner, own_attention = _with_our_attention(partial(build, trust_remote_code=False))
    return WrappedDecoder(inner, attention=attention, own_attention=own_attention)


def save_wrapped(model: WrappedDecoder, folder: Path) -> str:
    """Write the model's folder as transformers does; returns the name of the class that reads it."""
    model.inner.save_pretrained(folder)
    return type(model.inner).__name__
