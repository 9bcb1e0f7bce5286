"""FP8 files: weights of 8 bits (E4M3) with a scale for each block of 128 x 128 (DeepSeek-AI 2024), each row, or the tensor.

weight (out, in) float8_e4m3fn, and weight_scale_inv, which despite its name multiplies it; its shape tells the blocks.
Older files have weight_scale instead.
"""

from functools import partial

import torch
from torch import Tensor

from genai_pl.errors import CheckpointError
from genai_pl.models.hf.quantized.codes import spread
from genai_pl.models.hf.quantized.module_tensors import Format, ModuleTensors, Shape

BLOCK = 128  # rows and columns that share a scale


def weight_of(codes: Tensor, scales: Tensor, block: tuple[int, int] = (BLOCK, BLOCK)) -> Tensor:
    """The weight (out, in) in float32. scales: one, or (blocks of rows, blocks of columns), the last of which may be smaller.

    Scales (out, 1) or (out,) are those of rows.
    """
    return codes.float() * spread(scales, tuple(codes.shape), block)


def formats(options: dict) -> tuple[Format, ...]:
    """The format of a quantization_config."""
    rows, columns = options.get("weight_block_size") or (BLOCK, BLOCK)

    def unpack(scale: str, parts: ModuleTensors) -> Tensor:
        codes = parts.read("weight")
        if codes.dtype not in (torch.float8_e4m3fn, torch.float8_e5m2):
            raise CheckpointError(f"{parts.stem}weight has dtype {codes.dtype}, and a scale as one of 8 bits has")
        return weight_of(codes, parts.read(scale), (rows, columns))

    def shape(parts: ModuleTensors) -> Shape:
        return parts.shape("weight")

    extra = ("activation_scale", "input_scale")
    ends = ("weight_scale_inv", "weight_scale")
    return tuple(Format(end, shape, partial(unpack, end), extra=extra) for end in ends)
