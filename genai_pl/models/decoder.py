"""Decoder: GPT-2, Llama, Gemma and everything between them, by configuration.

Next-token prediction in one pass over a row: token t sees tokens up to t, so every position predicts its successor at once
(Radford et al. 2018). Rows may be packed: several documents stand one after the other, `segment_ids` numbers them from 1
(0 is padding), and no token sees another document. A cache carries keys and values from one call to the next, so that
decoding passes one new token at a time.

Continue reading in `transformer.py` (embeddings, stack, head), `block.py` (one layer), `attention.py` (heads,
positions, cache) and `kernels/attention.py` (the softmax).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from genai_pl.config.enums import AttentionKind, Position
from genai_pl.kernels import AttentionMask, positions_from_segments
from genai_pl.models.kv_cache import KVCache
from genai_pl.models.transformer import Transformer

POSITIONS = (Position.rotary, Position.learned, Position.sinusoidal)  # kinds that are no part of the scores


class Decoder(Transformer):
    """Next-token logits (B, T, V) of input_ids (B, T), with packing by `segment_ids` and a cache as an argument.

    `fused` is None until `prepare_for_decoding` finds passes with fewer operations, for a model that is only read.
    """

    causal = True
    fused: Callable[[Tensor, Tensor | None, KVCache | None], Tensor] | None = None

    def forward(self, input_ids: Tensor, segment_ids: Tensor | None = None, **options: object) -> Tensor:
        """Logits (B, T, V) in the dtype of the weights; `options` are those of `features`."""
        return self.logits(self.features(input_ids, segment_ids, **options))

    def features(
        self,
        input_ids: Tensor,
        segment_ids: Tensor | None = None,
        *,
        cache: KVCache | None = None,
        prefix: Tensor | None = None,
        shared_prompt_len: Tensor | None = None,
        source: Tensor | None = None,
        source_segments: Tensor | None = None,
    ) -> Tensor:
        """Hidden states (B, T, C) before the head.

        segment_ids        (B, T), 0 is padding, 1.. the documents of the row; None: each row is one document
        cache              the T tokens follow those that it holds, and it advances by T
        prefix             (B,), the first tokens of a row that see each other both ways (prefix LM, Raffel et al. 2020)
        shared_prompt_len  (B,), length of the prompt that all documents of a row share; it is stored once, in document 1,
                           and the others attend to it and continue its positions (if `supports_shared_prompts`)
        source             (B, S, C), an encoder's output, and its segments (B, S): documents of equal number see each other
        """
        if self.fused is not None and prefix is None and source is None and shared_prompt_len is None:
            return self.fused(input_ids, segment_ids, cache)
        T = input_ids.shape[1]
        is_first_call = cache is None or cache.length == 0  # of these rows
        # segments (B, S) and positions (S,) or (B, S) of all tokens: cached, then new; positions restart in each document
        past = 0 if cache is None else cache.n_text
        virtual = self.virtual_prefix(is_first_call=is_first_call)
        if cache is not None:
            segment_ids = cache.segments(segment_ids, T)
        if segment_ids is None:
            positions = torch.arange(past + T, device=input_ids.device)
        else:
            positions = positions_from_segments(segment_ids)
        if shared_prompt_len is not None:
            positions = positions + shared_prompt_len[:, None] * (segment_ids > 1)
        self.check_length(virtual.n + self.longest(positions))
        segments, positions = virtual.prepend_positions(segment_ids, positions, explicit=prefix is not None)
        # embed the new tokens, and virtual ones before them if this call is the first
        x = self.embed_inputs(input_ids, positions[..., -T - virtual.n_queries :], insert_virtual=virtual.prepend)
        # through the blocks
        x = self.forward_blocks(
            x,
            positions,
            segments,
            virtual=virtual,
            prefix=None if prefix is None else prefix + virtual.n,
            shared_prompt_len=shared_prompt_len,
            encoded=source,
            encoded_mask=None if source is None else _source_mask(input_ids, segment_ids, source_segments),
            cache=cache,
        )
        if cache is not None:
            cache.advance(T, virtual.n if is_first_call else 0)
        return x[:, virtual.n_queries :]

    @property
    def supports_shared_prompts(self) -> bool:
        """True if `shared_prompt_len` gives what whole documents would: not in a window, nor after virtual tokens."""
        windowed = any(window is not None for window in self.windows)
        return self.config.attention_kind is AttentionKind.full and not windowed and self.virtual is None

    def longest(self, positions: Tensor) -> int:
        """Number of positions needed: the row's length, or that of its longest document where the learned table is shorter."""
        length = positions.shape[-1]
        if positions.dim() == 1 or self.max_length is None or length <= self.max_length:
            return length
        return int(positions.max()) + 1  # a device sync, only here


def _source_mask(input_ids: Tensor, segment_ids: Tensor | None, source_segments: Tensor | None) -> AttentionMask:
    """The mask of the T new tokens over the source: all of it, or the document of equal number."""
    if source_segments is None:
        return AttentionMask()
    queries = torch.ones_like(input_ids) if segment_ids is None else segment_ids[:, -input_ids.shape[1] :]
    return AttentionMask(segments=source_segments, query_segments=queries)


def has_uniform_steps(model: object) -> bool:
    """True for a decoder whose every step is the same operations on other numbers: what fusing and recording both need.

    Positions are no distances between columns, and a token sees all columns of the cache and passes all weights.
    """
    if type(model) is not Decoder:
        return False
    c = model.config
    sees_all = c.attention_kind is AttentionKind.full and set(model.windows) == {None} and model.virtual is None
    return c.position in POSITIONS and sees_all and not c.n_experts
