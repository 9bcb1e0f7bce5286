"""GPTQ's files (AutoGPTQ, GPTQModel): codes of 2, 3, 4 or 8 bits with a scale and a zero for each group of inputs.

qweight (in * bits / 32, out) int32, qzeros (groups, out * bits / 32) int32, scales (groups, out), g_idx (in,): the group of
each input, in any order after `desc_act`. checkpoint_format "gptq" stores each zero less one, "gptq_v2" as it is.
"""

import torch
from torch import Tensor

from genai_pl.errors import CheckpointError, ConfigError
from genai_pl.models.hf.quantized.codes import WORD, unpacked
from genai_pl.models.hf.quantized.module_tensors import Format, ModuleTensors, Shape

BITS = (2, 3, 4, 8)


def weight_of(qweight: Tensor, qzeros: Tensor, scales: Tensor, groups: Tensor, *, bits: int, less: int) -> Tensor:
    """The weight (out, in) in float32: (code - zero) * scale. groups: (in,), those of each input. less: 1 for "gptq"."""
    codes = unpacked(qweight, bits, dim=0)[: len(groups)]  # (in, out)
    zeros = unpacked(qzeros, bits, dim=1)[:, : scales.shape[1]] + less  # (groups, out)
    groups = groups.long()
    return ((codes - zeros[groups]).float() * scales.float()[groups]).t().contiguous()


def formats(options: dict) -> tuple[Format, ...]:
    """The format of a quantization_config; ConfigError for a variant that is not read."""
    kind = options.get("checkpoint_format") or "gptq"
    if kind not in ("gptq", "gptq_v2"):
        raise ConfigError(f"checkpoint_format={kind!r} of GPTQ is not read: save it as gptq or gptq_v2 with GPTQModel")
    if options.get("rotation"):
        raise ConfigError(
            f"rotation={options['rotation']!r} of GPTQ is not read: activations would have to be turned too"
        )
    if (options.get("pack_dtype") or "int32") not in ("int32", "torch.int32"):
        raise ConfigError(f"pack_dtype={options['pack_dtype']!r} of GPTQ is not read: save it with int32")
    size = options.get("group_size") or -1

    def inputs(parts: ModuleTensors) -> int:
        """The number of inputs, by g_idx or else by the bits of the configuration."""
        if parts.has("g_idx"):
            return parts.shape("g_idx")[0]
        return parts.shape("qweight")[0] * WORD // int(options["bits"])

    def unpack(parts: ModuleTensors) -> Tensor:
        n, words = inputs(parts), parts.read("qweight")
        bits = len(words) * WORD // n  # those of this layer: `dynamic` may give it others
        if bits not in BITS or words.dtype is not torch.int32:
            raise CheckpointError(
                f"{parts.stem}qweight {list(words.shape)} {words.dtype} is none of GPTQ for {n} inputs"
            )
        groups = parts.maybe("g_idx")
        if groups is None:
            groups = torch.arange(n) // (size if size > 0 else n)
        rest = parts.read("qzeros"), parts.read("scales"), groups
        return weight_of(words, *rest, bits=bits, less=1 if kind == "gptq" else 0)

    def shape(parts: ModuleTensors) -> Shape:
        return parts.shape("qweight")[1], inputs(parts)

    return (Format("qweight", shape, unpack),)
