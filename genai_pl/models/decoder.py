"""The decoder: GPT-2, Llama, Gemma and what lies between, by configuration."""

from collections.abc import Callable

import torch
from torch import Tensor

from genai_pl.config.enums import AttentionKind
from genai_pl.kernels import AttentionMask, positions_from_segments
from genai_pl.models.kv_cache import KVCache
from genai_pl.models.transformer import Transformer


class Decoder(Transformer):
    """Next-token logits (B, T, V) of input_ids (B, T), with packing by `segment_ids` and a cache as an argument."""

    causal = True
    fused_step: Callable[[Tensor, Tensor | None, KVCache], Tensor] | None = (
        None  # what `prepare_for_decoding` found a shorter way for
    )

    def forward(self, input_ids: Tensor, segment_ids: Tensor | None = None, **given: object) -> Tensor:
        """Logits (B, T, V) in the dtype of the weights; segment_ids (B, T): 0 is padding, 1.. the row's documents."""
        return self.logits(self.features(input_ids, segment_ids, **given))

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
        """Hidden states (B, T, C) before the head; with a cache, the T tokens follow what it holds, and it advances.

        The first `prefix` (B,) tokens of a row see each other; the first `shared_prompt_len` (B,) begin each of its
        documents, though only document 1 holds them (if `supports_shared_prompts`); `source` (B, S, C) is another text
        that all read.
        """
        T = input_ids.shape[1]
        enters = cache is None or cache.length == 0
        if self.fused_step is not None and not enters and T == 1 and prefix is None and source is None:
            return self.fused_step(input_ids, segment_ids, cache)
        past = 0 if cache is None else cache.n_text
        virtual = self.virtual_prefix(enters=enters)
        if cache is not None:
            segment_ids = cache.segments(segment_ids, T)
        if segment_ids is None:
            positions = torch.arange(past + T, device=input_ids.device)  # (S,)
        else:
            positions = positions_from_segments(segment_ids)  # (B, S)
        if shared_prompt_len is not None:
            positions = positions + shared_prompt_len[:, None] * (segment_ids > 1)
        self.check_length(virtual.n + self._longest(positions))
        segments, positions = virtual.prepend_positions(segment_ids, positions, explicit=prefix is not None)
        x = self.embed_inputs(input_ids, positions[..., -T - virtual.n_queries :], insert_virtual=virtual.prepend)
        given = {
            "cache": cache,
            "prefix": None if prefix is None else prefix + virtual.n,
            "shared_prompt_len": shared_prompt_len,
        }
        if source is not None:
            queries = torch.ones_like(input_ids) if segment_ids is None else segment_ids[:, -T:]
            unmasked = source_segments is None
            mask = AttentionMask() if unmasked else AttentionMask(segments=source_segments, query_segments=queries)
            given |= {"source": source, "source_mask": mask}
        x = self.forward_blocks(x, positions, segments, virtual=virtual, **given)
        if cache is not None:
            cache.advance(T, virtual.n if enters else 0)
        return x[:, virtual.n_queries :]

    @property
    def supports_shared_prompts(self) -> bool:
        """Whether `shared_prompt_len` gives what whole documents would: not in a window, nor behind virtual tokens."""
        windowed = any(window is not None for window in self.windows)
        return self.config.attention_kind is AttentionKind.full and not windowed and self.virtual is None

    def _longest(self, positions: Tensor) -> int:
        """The length of the row or, where learned positions may end before it, of its longest document."""
        length = positions.shape[-1]
        if positions.dim() == 1 or self.max_length is None or length <= self.max_length:
            return length
        return int(positions.max()) + 1  # waits for the device, in this case only
