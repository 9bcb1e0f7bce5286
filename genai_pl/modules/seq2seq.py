"""Sequence-to-sequence training of an encoder-decoder on pairs of texts: translation, summarization."""

from torch import Tensor

from genai_pl.modules.base import Batch
from genai_pl.modules.token_prediction import TokenModule
from genai_pl.objectives.seq2seq import Seq2SeqCollator


class Seq2SeqModule(TokenModule):
    """Next-token prediction of a target by the decoder, given the source that the encoder has encoded."""

    shapes = ("encoder_decoder",)
    data_kind = "seq2seq"
    make_collator = Seq2SeqCollator

    def hidden(self, batch: Batch) -> Tensor:
        return self.model.features(
            batch["input_ids"],
            batch.get("segment_ids"),
            decoder_input_ids=batch["decoder_input_ids"],
            decoder_segment_ids=batch.get("decoder_segment_ids"),
        )
