"""Transformers: one configuration, one block, wired as the shape says."""

from genai_pl.models.block import Block
from genai_pl.models.build import Model, build_model
from genai_pl.models.cache import KVCache
from genai_pl.models.counts import FlopRates, flop_rates, flops_per_token, n_parameters
from genai_pl.models.decoder import Decoder
from genai_pl.models.encoder import Encoder
from genai_pl.models.encoder_decoder import EncoderDecoder, Reader
from genai_pl.models.joined import join
from genai_pl.models.pretrained import load_pretrained, save_pretrained
from genai_pl.models.wrapped import WrappedDecoder, load_wrapped
from genai_pl.specs import ModelConfig

__all__ = [
    "Block",
    "Decoder",
    "Encoder",
    "EncoderDecoder",
    "FlopRates",
    "KVCache",
    "Model",
    "ModelConfig",
    "Reader",
    "WrappedDecoder",
    "build_model",
    "flop_rates",
    "flops_per_token",
    "join",
    "load_pretrained",
    "load_wrapped",
    "n_parameters",
    "save_pretrained",
]
