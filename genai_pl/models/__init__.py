"""Transformers: one configuration, one block, wired as the shape says."""

from genai_pl.config.model import ModelConfig
from genai_pl.models.block import Block
from genai_pl.models.build import Model, build_model
from genai_pl.models.decoder import Decoder
from genai_pl.models.encoder import Encoder
from genai_pl.models.encoder_decoder import DecoderWithSource, EncoderDecoder
from genai_pl.models.flops import FlopRates, flop_rates, flops_per_token, n_parameters
from genai_pl.models.fused_decode import prepare_for_decoding
from genai_pl.models.hf.transformers_model import WrappedDecoder, load_wrapped
from genai_pl.models.hf.weights import load_pretrained, save_pretrained
from genai_pl.models.kv_cache import KVCache

__all__ = [
    "Block",
    "Decoder",
    "Encoder",
    "EncoderDecoder",
    "FlopRates",
    "KVCache",
    "Model",
    "ModelConfig",
    "DecoderWithSource",
    "WrappedDecoder",
    "build_model",
    "flop_rates",
    "flops_per_token",
    "prepare_for_decoding",
    "load_pretrained",
    "load_wrapped",
    "n_parameters",
    "save_pretrained",
]
