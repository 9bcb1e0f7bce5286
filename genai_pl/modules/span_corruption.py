"""Span corruption: pretraining an encoder-decoder on spans that sentinels replace (T5; Raffel et al. 2020)."""

from genai_pl.modules.seq2seq import Seq2SeqModule
from genai_pl.objectives import SpanCorruptionCollator


class SpanCorruptionModule(Seq2SeqModule):
    """Prediction by the decoder of the spans that the encoder saw as sentinel tokens."""

    data_kind = "text"
    needs = ("sentinels",)
    make_collator = SpanCorruptionCollator

    def make_prompt(self, text: str) -> str:
        """The text with one sentinel after it, to be filled in."""
        return f"{text} <extra_id_0>"
