"""Transformers: one configuration, one block, three shapes (decoder, encoder, encoder-decoder).

To read the code as a lesson, begin with `decoder.py` and follow a pass of GPT: `transformer.py` (embeddings, stack, head),
`block.py` (one layer), `attention.py` (heads and cache), `kernels/attention.py` (the softmax). The rest are variants:
positions in `positions.py` and `relative_positions.py`, virtual tokens of prompt tuning, fused decoding steps. `hf/` reads
and writes folders of transformers, `onnx/` graphs for ONNX Runtime, `gguf/` files of llama.cpp.
"""

from genai_pl.config.model import ModelConfig
from genai_pl.models.attention_choice import move_to
from genai_pl.models.block import Block
from genai_pl.models.build import Model, build_empty, build_model
from genai_pl.models.decoder import Decoder
from genai_pl.models.encoder import Encoder
from genai_pl.models.encoder_decoder import DecoderWithSource, EncoderDecoder
from genai_pl.models.flops import FlopRates, flop_rates, flops_per_token, n_active_parameters, n_parameters
from genai_pl.models.fused_decode import prepare_for_decoding
from genai_pl.models.hf.transformers_model import WrappedDecoder, load_wrapped
from genai_pl.models.hf.weights import load_pretrained, save_pretrained
from genai_pl.models.kv_cache import KVCache
from genai_pl.models.protocol import CausalModel, LanguageModel, PipelineModel, TensorParallelLayer

__all__ = [
    "Block",
    "CausalModel",
    "Decoder",
    "DecoderWithSource",
    "Encoder",
    "EncoderDecoder",
    "FlopRates",
    "KVCache",
    "LanguageModel",
    "Model",
    "ModelConfig",
    "PipelineModel",
    "TensorParallelLayer",
    "WrappedDecoder",
    "build_empty",
    "build_model",
    "flop_rates",
    "flops_per_token",
    "load_pretrained",
    "load_wrapped",
    "n_active_parameters",
    "n_parameters",
    "move_to",
    "prepare_for_decoding",
    "save_pretrained",
]
