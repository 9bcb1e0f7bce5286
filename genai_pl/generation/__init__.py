"""Decoding: tokens and text out of a model."""

from genai_pl.generation.decode import Context, decode, evaluating, generate
from genai_pl.generation.processors import process, sample
from genai_pl.generation.stream import Detokenizer, StopFilter, TextStream
from genai_pl.generation.text import continue_rows, encode_prompt, generate_text, left_pad

__all__ = [
    "Context",
    "Detokenizer",
    "StopFilter",
    "TextStream",
    "continue_rows",
    "decode",
    "encode_prompt",
    "evaluating",
    "generate",
    "generate_text",
    "left_pad",
    "process",
    "sample",
]
