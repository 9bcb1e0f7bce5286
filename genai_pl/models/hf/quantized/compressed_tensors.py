"""compressed-tensors' files (LLM Compressor): integers of 2 to 8 bits, FP8, and the FP4 of NVIDIA and of Microscaling.

"pack-quantized": weight_packed (out, words) int32 of codes less their offset 2^(bits - 1), weight_scale, weight_shape, and
perhaps weight_zero_point (packed along the outputs) and weight_g_idx (in,). "int-quantized", "float-quantized",
"naive-quantized": weight in 8 bits and weight_scale. "nvfp4-pack-quantized", "mxfp4-pack-quantized": weight_packed
(out, in / 2) uint8, the earlier code in the low half, and weight_scale, with weight_global_scale that divides it.
"""

import torch
from torch import Tensor

from genai_pl.errors import CheckpointError, ConfigError
from genai_pl.models.hf.mxfp4 import BIAS, VALUES
from genai_pl.models.hf.quantized.codes import WORD, spread, unpacked, unpacked_apart
from genai_pl.models.hf.quantized.module_tensors import Format, ModuleTensors, Shape

READ = (
    "dense", "pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision",
    "nvfp4-pack-quantized", "mxfp4-pack-quantized",
)  # fmt: skip
EIGHT_BITS = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)
ENDS = ("scale", "zero_point", "global_scale")  # of inputs and outputs, which plain products do not round
EXTRA = (*(f"{side}_{end}" for side in ("input", "output") for end in ENDS), "weight_zero_point", "weight_g_idx")


def weight_of_words(
    words: Tensor, scales: Tensor, zeros: Tensor | None, groups: Tensor | None, *, shape: tuple[int, int], bits: int
) -> Tensor:
    """The weight (out, in) in float32: (code - 2^(bits - 1) - zero) * scale.

    zeros: packed along the outputs, for asymmetric codes. groups: (in,), those of each input, which may be in any order.
    """
    out, width = shape
    codes = _codes(words, bits, width, dim=1) - (1 << (bits - 1))
    if zeros is not None:
        if zeros.dtype is torch.int32:
            zeros = _codes(zeros, bits, out, dim=0) - (1 << (bits - 1))
        codes = codes - (spread(zeros, shape) if groups is None else zeros[:, groups.long()])
    return codes.float() * (spread(scales, shape) if groups is None else scales.float()[:, groups.long()])


def weight_of_4_bit_floats(codes: Tensor, scales: Tensor, whole: Tensor | None) -> Tensor:
    """The weight (out, in) in float32. codes: two E2M1 in a byte. scales: E4M3 over `whole`, or exponents of 2 (uint8)."""
    values = torch.tensor(VALUES)[torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2).int()]
    if scales.dtype is torch.uint8:
        return torch.ldexp(values, spread(scales, tuple(values.shape)).int() - BIAS)
    return values * spread(scales.float() if whole is None else scales.float() / whole.float(), tuple(values.shape))


def formats(options: dict) -> tuple[Format, ...]:
    """The formats of a quantization_config; ConfigError for a variant that is not read."""
    groups = [group for group in (options.get("config_groups") or {}).values() if isinstance(group, dict)]
    for name in {options.get("format") or "dense", *(group.get("format") or "dense" for group in groups)}:
        if name not in READ:
            raise ConfigError(f"format={name!r} of compressed-tensors is not read: decompress it with llm-compressor")
    if options.get("transform_config"):
        raise ConfigError("transform_config of compressed-tensors is not read: activations would have to be turned too")
    sparse = (options.get("sparsity_config") or {}).get("format") or "dense"
    if sparse != "dense":
        raise ConfigError(
            f"sparsity_config.format={sparse!r} of compressed-tensors is not read: save the weights dense"
        )
    weights = [group["weights"] for group in groups if group.get("weights")]
    widths = sorted({int(weight["num_bits"]) for weight in weights})
    blocks = [tuple(weight["block_structure"]) for weight in weights if weight.get("block_structure")]

    def unpack(parts: ModuleTensors) -> Tensor:
        packed, scales = parts.read("weight_packed"), parts.read("weight_scale")
        if packed.dtype is torch.uint8:
            return weight_of_4_bit_floats(packed, scales, parts.maybe("weight_global_scale"))
        out, width = packed_shape(parts)
        bits = [n for n in widths if packed.shape[1] in _words(n, width)]
        if len(bits) != 1:
            raise CheckpointError(
                f"{parts.stem}weight_packed {list(packed.shape)} is of none or several of {widths} bits"
            )
        rest = parts.maybe("weight_zero_point"), parts.maybe("weight_g_idx")
        return weight_of_words(packed, scales, *rest, shape=(out, width), bits=bits[0])

    def unpack_8_bits(parts: ModuleTensors) -> Tensor:
        codes, scales, zeros = parts.read("weight"), parts.read("weight_scale"), parts.maybe("weight_zero_point")
        if codes.dtype not in EIGHT_BITS:
            raise CheckpointError(f"{parts.stem}weight has dtype {codes.dtype}, and a scale as one of 8 bits has")
        shape, block = tuple(codes.shape), blocks[0] if blocks else None
        values = codes.float() if zeros is None else codes.float() - spread(zeros, shape, block)
        return values * spread(scales, shape, block)

    return (
        Format("weight_packed", packed_shape, unpack, extra=EXTRA),
        Format("weight_scale", lambda parts: parts.shape("weight"), unpack_8_bits, extra=EXTRA),
    )


def packed_shape(parts: ModuleTensors) -> Shape:
    """The shape of a weight: that in weight_shape, or twice the bytes of a row of FP4."""
    if parts.has("weight_shape"):
        return tuple(parts.read("weight_shape").tolist())
    out, half = parts.shape("weight_packed")
    return out, 2 * half


def _words(bits: int, n: int) -> tuple[int, int]:
    """Words for n codes: as one stream, and with 32 // bits in each, as older versions have them."""
    return -(-n * bits // WORD), -(-n // (WORD // bits))


def _codes(words: Tensor, bits: int, n: int, *, dim: int) -> Tensor:
    stream, _ = _words(bits, n)
    codes = (unpacked if words.shape[dim] == stream else unpacked_apart)(words, bits, dim=dim)
    return codes.narrow(dim, 0, n)
