"""The encoder-decoder: Vaswani et al. 2017 and T5, by configuration."""

from copy import copy
from dataclasses import replace

from torch import Tensor, nn

from genai_pl.config.enums import Head, Shape
from genai_pl.config.model import ModelConfig
from genai_pl.models.decoder import Decoder
from genai_pl.models.encoder import Encoder
from genai_pl.models.kv_cache import KVCache


class EncoderDecoder(nn.Module):
    """Next-token logits of decoder_input_ids (B, T) given input_ids (B, S); one embedding serves both."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        n_layer = config.n_decoder_layer
        common = {"n_decoder_layer": None}
        self.encoder = Encoder(replace(config, **common, shape=Shape.encoder, head=Head.none))
        self.decoder = Decoder(replace(config, **common, shape=Shape.decoder, n_layer=n_layer), cross=True)
        self.encoder.embed = self.decoder.embed

    def tie_weights(self) -> None:
        """Make the head share the embedding's weight where the configuration says so."""
        self.decoder.tie_weights()

    @property
    def embed(self) -> nn.Embedding:
        """The embedding of both."""
        return self.decoder.embed

    @property
    def lm_head(self) -> nn.Linear:
        """The decoder's."""
        return self.decoder.lm_head

    @property
    def blocks(self) -> list[nn.Module]:
        """The encoder's, then the decoder's."""
        return [*self.encoder.blocks, *self.decoder.blocks]

    def forward(self, input_ids: Tensor, segment_ids: Tensor | None = None, **target: Tensor | None) -> Tensor:
        """Logits (B, T, V); `target` is what `features` takes."""
        return self.logits(self.features(input_ids, segment_ids, **target))

    def features(
        self,
        input_ids: Tensor,
        segment_ids: Tensor | None = None,
        *,
        decoder_input_ids: Tensor,
        decoder_segment_ids: Tensor | None = None,
    ) -> Tensor:
        """Hidden states (B, T, C) of the decoder; documents of equal segment ids read each other."""
        source, source_segments, _ = self.encoder.encode(input_ids, segment_ids)
        given = {"source": source, "source_segments": source_segments}
        return self.decoder.features(decoder_input_ids, decoder_segment_ids, **given)

    def to_head(self, hidden: Tensor) -> Tensor:
        """What the head multiplies, of hidden states of the decoder."""
        return self.decoder.to_head(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., C) of the decoder."""
        return self.decoder.logits(hidden)

    def encode_source(self, input_ids: Tensor, segment_ids: Tensor | None = None) -> "DecoderWithSource":
        """The decoder with one source (B, S), to decode from as from a decoder alone."""
        return DecoderWithSource(self, *self.encoder.encode(input_ids, segment_ids)[:2])


class DecoderWithSource(nn.Module):
    """A decoder that has read a source: `features` and `new_cache` are a decoder's."""

    def __init__(self, model: EncoderDecoder, source: Tensor, source_segments: Tensor | None) -> None:
        super().__init__()
        self.config, self.decoder = model.config, model.decoder
        self.source, self.source_segments = source, source_segments

    def features(self, input_ids: Tensor, segment_ids: Tensor | None = None, *, cache: KVCache | None = None) -> Tensor:
        """Hidden states (B, T, C) of a text that is written while reading the source."""
        return self.decoder.features(
            input_ids, segment_ids, cache=cache, source=self.source, source_segments=self.source_segments
        )

    def keep_rows(self, rows: Tensor) -> "DecoderWithSource":
        """The same decoder with sources reordered, repeated or dropped, (B',) indices."""
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
