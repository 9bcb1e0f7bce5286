"""AWQ's files in the layout "gemm": codes of 4 bits with a scale and a zero for each group of inputs (Lin et al. 2024).

qweight (in, out / 8) int32, qzeros (groups, out / 8) int32, scales (groups, out). The eight output channels of a word are
stored in the order 0, 2, 4, 6, 1, 3, 5, 7, lowest bits first.
"""

import torch
from torch import Tensor

from genai_pl.errors import ConfigError
from genai_pl.models.hf.quantized.codes import WORD, unpacked
from genai_pl.models.hf.quantized.module_tensors import Format, ModuleTensors, Shape

BITS = 4
ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where each channel of a word lies in it


def weight_of(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> Tensor:
    """The weight (out, in) in float32: (code - zero) * scale."""
    codes, zeros = (_in_order(unpacked(words, BITS, dim=1)) for words in (qweight, qzeros))
    size = len(codes) // len(zeros)
    zeros, scales = (x.repeat_interleave(size, dim=0) for x in (zeros, scales.float()))
    return ((codes - zeros).float() * scales).t().contiguous()


def _in_order(codes: Tensor) -> Tensor:
    """Codes (n, out) by channel."""
    return codes.view(len(codes), -1, WORD // BITS)[..., torch.tensor(ORDER)].flatten(1)


def formats(options: dict) -> tuple[Format, ...]:
    """The format of a quantization_config; ConfigError for a variant that is not read."""
    version = str(options.get("version") or options.get("format") or "gemm").lower()
    if version != "gemm" or options.get("bits", options.get("w_bit", BITS)) != BITS:
        bits = options.get("bits", options.get("w_bit"))
        raise ConfigError(
            f"AWQ's version={version!r} with bits={bits} is not read: save it with version=gemm and 4 bits"
        )

    def shape(parts: ModuleTensors) -> Shape:
        width, words = parts.shape("qweight")
        return words * WORD // BITS, width

    def unpack(parts: ModuleTensors) -> Tensor:
        return weight_of(*(parts.read(end) for end in ("qweight", "qzeros", "scales")))

    return (Format("qweight", shape, unpack),)
