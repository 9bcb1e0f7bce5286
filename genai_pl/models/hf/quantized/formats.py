"""The formats by `quant_method` of a config.json, and the weights that stand packed in a folder's files."""

from collections.abc import Callable, Collection, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from genai_pl.errors import ConfigError
from genai_pl.models.hf import mxfp4
from genai_pl.models.hf.quantized import awq, bitsandbytes, compressed_tensors, fp8, gptq, torchao
from genai_pl.models.hf.quantized.module_tensors import Format, ModuleTensors, Reader, Shape

METHODS: dict[str, Callable[[dict], tuple[Format, ...]]] = {
    "gptq": gptq.formats,
    "awq": awq.formats,
    "bitsandbytes": bitsandbytes.formats,
    "fp8": fp8.formats,
    "compressed-tensors": compressed_tensors.formats,
    "torchao": torchao.formats,
    "mxfp4": lambda options: (),  # its names tell it
}


class PackedWeight(NamedTuple):
    """A weight that several tensors of a file stand for.

    format: how; parts: those tensors; beside: names of further ones that no product of plain numbers reads.
    """

    format: Format
    parts: ModuleTensors
    beside: tuple[str, ...]

    def shape(self) -> Shape:
        """The shape of the weight."""
        return self.format.shape(self.parts)

    def read(self) -> Tensor:
        """The weight, unpacked."""
        return self.format.unpack(self.parts)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of `read`."""
        return torch.bfloat16 if self.format is MXFP4 else torch.float32


def _mxfp4_shape(parts: ModuleTensors) -> Shape:
    return mxfp4.dequantized_shape(parts.shape(mxfp4.BLOCKS), parts.shape(mxfp4.SCALES))


def _unpack_mxfp4(parts: ModuleTensors) -> Tensor:
    return mxfp4.dequantized(parts.read(mxfp4.BLOCKS), parts.read(mxfp4.SCALES))


# gpt-oss' experts, whose config.json may say nothing of it
MXFP4 = Format(mxfp4.BLOCKS, _mxfp4_shape, _unpack_mxfp4, end="")


def check_quantization(options: object, *, allowed: Collection[str] | None = None) -> None:
    """ConfigError for a quantization_config that is not read. allowed: the methods that a family takes; None: all."""
    if options is None:
        return
    method = options.get("quant_method") if isinstance(options, dict) else None
    known = METHODS if allowed is None else allowed
    if not isinstance(method, str) or method not in known:
        shown = f"quant_method={method!r}" if method else repr(options)
        supported = f" (read are {', '.join(known)})" if known else ""
        raise ConfigError(
            f"quantization_config: {shown} is not read for this model_type{supported}: "
            "load it with transformers, model.dequantize(), and save it"
        )
    METHODS[method](options)


def packed_weights(options: object, names: Collection[str], reader: Reader) -> dict[str, PackedWeight]:
    """The weights that stand packed among tensors of these names, by their own names.

    options: quantization_config; one that is not read, or None, leaves those of MXFP4.
    """
    method = options.get("quant_method") if isinstance(options, dict) else None
    is_known = isinstance(method, str) and method in METHODS
    kinds = (*METHODS[method](options), MXFP4) if is_known else (MXFP4,)
    found: dict[str, PackedWeight] = {}
    for kind in kinds:
        for name in names:
            stem = name.removesuffix(kind.mark)
            own = stem + kind.end
            if stem == name or own in found:
                continue
            if kind is MXFP4 and (own in names or stem + mxfp4.SCALES not in names):
                continue
            beside = tuple(stem + end for end in kind.extra if stem + end in names)
            found[own] = PackedWeight(kind, ModuleTensors(reader, stem, names), beside)
    return found


def plain_names(names: Iterable[str], packed: Collection[PackedWeight]) -> list[str]:
    """The names of tensors that are no part of a packed weight; biases beside one are plain."""
    stems = {weight.parts.stem for weight in packed}

    def is_part(name: str) -> bool:
        above = (name[: n + 1] for n, letter in enumerate(name) if letter == ".")
        return name.removesuffix(mxfp4.BLOCKS).removesuffix(mxfp4.SCALES) in stems or any(x in stems for x in above)

    return [name for name in names if name.endswith(".bias") or not is_part(name)]
