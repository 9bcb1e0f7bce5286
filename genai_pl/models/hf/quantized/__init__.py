"""Quantized checkpoints of others, read as plain numbers: GPTQ, AWQ, bitsandbytes, FP8, compressed-tensors, torchao, MXFP4."""

from genai_pl.models.hf.quantized.formats import PackedWeight, check_quantization, packed_weights, plain_names

__all__ = ["PackedWeight", "check_quantization", "packed_weights", "plain_names"]
