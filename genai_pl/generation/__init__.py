"""Decoding: tokens and text out of a model."""

from genai_pl.generation.beam import Hypothesis, beam_search
from genai_pl.generation.completions import Completion, left_pad
from genai_pl.generation.decode import decode, evaluating, generate
from genai_pl.generation.decode_state import Context
from genai_pl.generation.detokenize import Detokenizer, StopFilter, TextStream
from genai_pl.generation.output_constraints import Limits, limits_of
from genai_pl.generation.processors import process, sample
from genai_pl.generation.speculative import Acceptance
from genai_pl.generation.text import check_bias, complete, continue_rows, encode_prompt, generate_text

__all__ = [
    "Acceptance",
    "Completion",
    "Context",
    "Detokenizer",
    "Hypothesis",
    "Limits",
    "StopFilter",
    "TextStream",
    "beam_search",
    "check_bias",
    "complete",
    "continue_rows",
    "decode",
    "encode_prompt",
    "evaluating",
    "generate",
    "generate_text",
    "left_pad",
    "limits_of",
    "process",
    "sample",
]
