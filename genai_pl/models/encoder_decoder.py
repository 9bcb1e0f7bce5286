"""Encoder-decoder: Vaswani et al. 2017 and T5, by configuration.

The encoder reads a source text once; every block of the decoder attends to its output, besides the target so far. While
decoding, `encode_source` gives a `DecoderWithSource`, which looks like a decoder, so that generation and serving know
only one kind of model.
"""

from copy import copy
from dataclasses import replace

from torch import Tensor, nn

from genai_pl.config.enums import Head, Shape
from genai_pl.config.model import ModelConfig
from genai_pl.distributed.context_group import ALONE
from genai_pl.models.decoder import Decoder
from genai_pl.models.encoder import Encoder
from genai_pl.models.kv_cache import KVCache


class EncoderDecoder(nn.Module):
    """Next-token logits of decoder_input_ids (B, T) given input_ids (B, S).

    config: `n_layer` layers of the encoder, `n_decoder_layer` of the decoder; one embedding serves both, and is tied to the
    head where `tie_embeddings` is set.
    """

    feature_methods = ("features",)
    context_group = ALONE

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        n_layer = config.n_decoder_layer
        common = {"n_decoder_layer": None}
        self.encoder = Encoder(replace(config, **common, shape=Shape.encoder, head=Head.none))
        self.decoder = Decoder(replace(config, **common, shape=Shape.decoder, n_layer=n_layer), cross=True)
        self.encoder.embed = self.decoder.embed

    def tie_weights(self) -> None:
        """Make the head share the embedding's weight where `tie_embeddings` is set."""
        self.decoder.tie_weights()

    @property
    def embed(self) -> nn.Embedding:
        """The embedding of encoder and decoder."""
        return self.decoder.embed

    @property
    def lm_head(self) -> nn.Linear:
        """The decoder's head."""
        return self.decoder.lm_head

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks of the encoder, then those of the decoder."""
        return [*self.encoder.blocks, *self.decoder.blocks]

    def forward(self, input_ids: Tensor, segment_ids: Tensor | None = None, **target: Tensor | None) -> Tensor:
        """Logits (B, T, V); `target` holds the keyword arguments of `features`."""
        return self.logits(self.features(input_ids, segment_ids, **target))

    def features(
        self,
        input_ids: Tensor,
        segment_ids: Tensor | None = None,
        *,
        decoder_input_ids: Tensor,
        decoder_segment_ids: Tensor | None = None,
    ) -> Tensor:
        """Hidden states (B, T, C) of the decoder.

        input_ids (B, S), segment_ids (B, S): the source; decoder_input_ids (B, T), decoder_segment_ids (B, T): the target.
        In packed rows a target document attends to the source document of equal segment id.
        """
        source, source_segments, _ = self.encoder.encode(input_ids, segment_ids)
        given = {"source": source, "source_segments": source_segments}
        return self.decoder.features(decoder_input_ids, decoder_segment_ids, **given)

    def to_head(self, hidden: Tensor) -> Tensor:
        """The input of `lm_head` from hidden states of the decoder."""
        return self.decoder.to_head(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., C) of the decoder."""
        return self.decoder.logits(hidden)

    def encode_source(self, input_ids: Tensor, segment_ids: Tensor | None = None) -> "DecoderWithSource":
        """The decoder bound to a source (B, S), to be decoded from like a decoder alone; segment 0 is padding."""
        return DecoderWithSource(self, *self.encoder.encode(input_ids, segment_ids)[:2])


class DecoderWithSource(nn.Module):
    """A decoder bound to encoded sources, one per row, with the interface of a decoder: `features`, `logits`, `new_cache`.

    model: the encoder-decoder. source (B, S, C): the encoder's output. source_segments (B, S): 0 is padding, or None.
    Rows that are dropped or reordered while decoding take their sources with them (`keep_rows`).
    """

    def __init__(self, model: EncoderDecoder, source: Tensor, source_segments: Tensor | None) -> None:
        super().__init__()
        self.config, self.decoder = model.config, model.decoder
        self.source, self.source_segments = source, source_segments

    def features(self, input_ids: Tensor, segment_ids: Tensor | None = None, *, cache: KVCache | None = None) -> Tensor:
        """Hidden states (B, T, C) of the target; with a cache, the T tokens follow those that it holds."""
        return self.decoder.features(
            input_ids, segment_ids, cache=cache, source=self.source, source_segments=self.source_segments
        )

    def keep_rows(self, rows: Tensor) -> "DecoderWithSource":
        """The same decoder with row rows[i] of the sources at i, (B',) indices."""
        reordered = copy(self)
        reordered.source = self.source[rows]
        reordered.source_segments = None if self.source_segments is None else self.source_segments[rows]
        return reordered

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., V)."""
        return self.decoder.logits(hidden)

    def new_cache(self, batch_size: int, max_length: int) -> KVCache:
        """An empty cache of the decoder."""
        return self.decoder.new_cache(batch_size, max_length)
