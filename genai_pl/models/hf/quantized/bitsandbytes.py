"""bitsandbytes' files: nf4 and fp4 codes of 4 bits in blocks (Dettmers et al. 2023), int8 with a scale for each row (2022).

4 bits: weight (N / 2, 1) uint8, the earlier code in the high half; weight.quant_map (16,), what codes stand for;
weight.absmax, the scale of each block, which is itself codes of 8 bits if there is weight.nested_absmax; and
weight.quant_state.bitsandbytes__nf4, JSON of shape, dtype and sizes of blocks. 8 bits: weight (out, in) int8, SCB (out,).
"""

from functools import partial

from torch import Tensor

from genai_pl.errors import CheckpointError
from genai_pl.models.hf.quantized.module_tensors import Format, ModuleTensors, Shape

STATE = "weight.quant_state.bitsandbytes__"
LARGEST = 127  # code of 8 bits


def weight_of_4_bits(codes: Tensor, scales: Tensor, values: Tensor, *, shape: Shape, size: int) -> Tensor:
    """The weight in float32. codes: two in a byte; scales: of each block of `size` weights; values (16,): what codes mean."""
    flat = codes.flatten()
    indices = flat.new_empty(2 * len(flat))
    indices[::2], indices[1::2] = flat >> 4, flat & 15
    n = 1
    for length in shape:
        n *= length
    if len(indices) < n or len(scales) * size < n:
        raise CheckpointError(f"{len(indices)} codes and {len(scales)} scales of 4 bits are too few for {list(shape)}")
    return (values.float()[indices[:n].int()] * scales.float().repeat_interleave(size)[:n]).view(shape)


def scales_of(codes: Tensor, values: Tensor, scales: Tensor, *, size: int, offset: float) -> Tensor:
    """The scales of blocks that are quantized themselves: codes of 8 bits in blocks of `size`, less their mean `offset`."""
    return values.float()[codes.int()] * scales.float().repeat_interleave(size)[: len(codes)] + offset


def weight_of_8_bits(codes: Tensor, scales: Tensor) -> Tensor:
    """The weight (out, in) in float32 of codes (int8) and the largest magnitude of each row (out,)."""
    return codes.float() * scales.float()[:, None] * (1 / LARGEST)


def formats(options: dict) -> tuple[Format, ...]:
    """The formats of a quantization_config; a file says by its names which weights are packed."""
    kinds = [Format(STATE + kind, partial(_shape, kind), partial(_unpack, kind)) for kind in ("nf4", "fp4")]
    return *kinds, Format("SCB", lambda parts: parts.shape("weight"), _unpack_8_bits, extra=("weight_format",))


def _shape(kind: str, parts: ModuleTensors) -> Shape:
    return tuple(parts.json(STATE + kind)["shape"])


def _unpack(kind: str, parts: ModuleTensors) -> Tensor:
    state = parts.json(STATE + kind)
    scales = parts.read("weight.absmax")
    if parts.has("weight.nested_absmax"):
        nested = (parts.read(f"weight.nested_{part}") for part in ("quant_map", "absmax"))
        scales = scales_of(scales, *nested, size=state["nested_blocksize"], offset=state["nested_offset"])
    codes, values = parts.read("weight"), parts.read("weight.quant_map")
    return weight_of_4_bits(codes, scales, values, shape=tuple(state["shape"]), size=state["blocksize"])


def _unpack_8_bits(parts: ModuleTensors) -> Tensor:
    return weight_of_8_bits(parts.read("weight"), parts.read("SCB"))
