"""torchao's files, as transformers writes them: STEM._weight_qdata (out, in) in 8 bits, _weight_scale, _weight_zero_point.

Scales are those of rows or of groups of inputs. Codes that are packed for the kernels of one machine are refused.
"""

import torch
from torch import Tensor

from genai_pl.errors import CheckpointError
from genai_pl.models.hf.quantized.codes import spread
from genai_pl.models.hf.quantized.module_tensors import Format, ModuleTensors

CODES, SCALES, ZEROS = "_weight_qdata", "_weight_scale", "_weight_zero_point"


def weight_of(codes: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
    """The weight (out, in) in float32: (code - zero) * scale."""
    shape = tuple(codes.shape)
    values = codes.float() if zeros is None else codes.float() - spread(zeros, shape)
    return values * spread(scales, shape)


def formats(options: dict) -> tuple[Format, ...]:
    """The format of a quantization_config."""

    def unpack(parts: ModuleTensors) -> Tensor:
        codes = parts.read(CODES)
        if codes.dtype not in (torch.int8, torch.float8_e4m3fn) or not parts.has(SCALES):
            raise CheckpointError(
                f"{parts.stem}{CODES}: torchao's codes of {codes.dtype} are packed for kernels, not read: "
                "save int8 or float8 weights, or dequantized ones"
            )
        return weight_of(codes, parts.read(SCALES), parts.maybe(ZEROS))

    return (Format(CODES, lambda parts: parts.shape(CODES), unpack, extra=("_weight_act_quant_scale",)),)
