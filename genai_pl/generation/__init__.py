"""Decoding: tokens and text from a trained model.

From the outside in: `complete` (text.py) takes prompts; `CompletionRunner` (completions.py) runs sampling, speculation or beam
search; `decode` (decode.py) is the loop; `DecodeState` (decode_state.py) owns the KV cache; `sample` (processors.py) chooses
the next token; `BannedTokens` (banned_tokens.py) and `GrammarConstraint` (grammar.py) say which tokens are impossible.
"""

from genai_pl.generation.beam import Hypothesis, beam_search
from genai_pl.generation.completions import Completion, left_pad
from genai_pl.generation.decode import decode, evaluating, generate
from genai_pl.generation.decode_state import DecodeState
from genai_pl.generation.detokenize import Detokenizer, StopFilter, TextStream
from genai_pl.generation.fill_in_the_middle import encode_gap, find_format
from genai_pl.generation.output_constraints import OutputConstraints, build_output_constraints
from genai_pl.generation.processors import draw_token, process, sample
from genai_pl.generation.speculative import Acceptance
from genai_pl.generation.text import check_bias, complete, continue_rows, encode_prompt, generate_text

__all__ = [
    "Acceptance",
    "Completion",
    "DecodeState",
    "Detokenizer",
    "Hypothesis",
    "OutputConstraints",
    "StopFilter",
    "TextStream",
    "beam_search",
    "check_bias",
    "complete",
    "continue_rows",
    "decode",
    "draw_token",
    "encode_gap",
    "encode_prompt",
    "evaluating",
    "find_format",
    "generate",
    "generate_text",
    "left_pad",
    "build_output_constraints",
    "process",
    "sample",
]
