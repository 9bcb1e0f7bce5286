"""GGUF files, written: metadata first, then one tensor after the other, of which one is in memory at a time."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from genai_pl.models.build import Model
from genai_pl.models.gguf.architectures import Architecture
from genai_pl.models.gguf.metadata import write_metadata
from genai_pl.models.gguf.package import gguf_package
from genai_pl.models.gguf.rope import FACTORS, scaling_factors
from genai_pl.models.hf.weights import stored_tensor
from genai_pl.progress import progress_bar

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFWriter

# matrices that llama.cpp reads in float32 alone
EXACT = ("ffn_gate_inp.weight", "position_embd.weight")
# of a type with 4 or 5 bits, the embedding and the head have 8: every logit depends on them
OUTER = ("token_embd.weight", "output.weight")
FILE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "bf16": 32}  # of llama.cpp


def write_gguf(
    model: Model, architecture: Architecture, file: Path, *, tokenizer: Mapping[str, object], quantize: str, name: str
) -> list[str]:
    """Write a model; returns the names of tensors whose rows are no multiple of a block, and which are in float16.

    tokenizer: metadata of the tokenizer. quantize: type of the matrices, one of `WRITABLE`. name: general.name.
    """
    gguf = gguf_package("format=gguf")
    # metadata
    writer = gguf.GGUFWriter(file, architecture.name)
    keys = write_metadata(model.config, architecture)
    keys |= {"general.type": "model", "general.name": name, "general.file_type": FILE_TYPES[quantize], **tokenizer}
    if quantize.startswith("q"):
        keys["general.quantization_version"] = gguf.GGML_QUANT_VERSION
    _add_keys(writer, {key: value for key, value in keys.items() if key != "general.architecture"})
    # headers of all tensors
    state, rows = model.state_dict(), list(architecture.table(model.config))
    factors = scaling_factors(model.config)
    coarse, types = [], []
    if factors is not None:
        writer.add_tensor_info(FACTORS, tuple(factors.shape), factors.numpy().dtype, factors.nbytes)
    for row in rows:
        shape = _shape(state, row.names)
        kind = _type_of(row.hf_name, shape, quantize)
        coarse += [row.hf_name] if kind.startswith("f16") and quantize.startswith("q") else []
        types.append(gguf.GGMLQuantizationType[kind.upper()])
        _add_info(writer, row.hf_name, shape, types[-1])
    # headers to the file, then the tensors
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors.numpy())
    with progress_bar(len(rows), "writing", unit=" tensors") as bar:
        for row, kind in zip(rows, types, strict=True):
            writer.write_tensor_data(quantized(stored_tensor(state, row), kind))
            bar.update()
    writer.close()
    return coarse


def write_lora_gguf(factors: Mapping[str, Tensor], architecture: Architecture, file: Path, *, name: str) -> None:
    """Write an adapter, float32. factors: A and B of each matrix by its name; name: general.name."""
    gguf = gguf_package("format=gguf_lora")
    writer = gguf.GGUFWriter(file, architecture.name)
    keys = {"general.type": "adapter", "general.name": name, "adapter.type": "lora", "adapter.lora.alpha": 0.0}
    _add_keys(writer, keys)
    for key, tensor in factors.items():
        writer.add_tensor(key, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantized(tensor: Tensor, kind: "GGMLQuantizationType") -> "np.ndarray":
    """The tensor in a type of GGUF, as the array of its bytes or numbers."""
    from gguf import quants

    return quants.quantize(tensor.float().contiguous().numpy(), kind)


def _shape(state: Mapping[str, Tensor], names: Iterable[str]) -> tuple[int, ...]:
    """The shape of tensors that are joined along the output dimension."""
    shapes = [tuple(state[name].shape) for name in names]
    return sum(shape[0] for shape in shapes), *shapes[0][1:]


def _type_of(name: str, shape: tuple[int, ...], quantize: str) -> str:
    """The type of one tensor: vectors and some matrices are in float32, whatever the type of the file."""
    if len(shape) < 2 or name in EXACT or name.endswith((EXACT[0], ".bias")):
        return "f32"
    if not quantize.startswith("q"):
        return quantize
    if shape[-1] % 32:  # numbers of a block
        return "f16"
    return "q8_0" if name in OUTER else quantize


def _add_info(writer: "GGUFWriter", name: str, shape: tuple[int, ...], kind: "GGMLQuantizationType") -> None:
    """Announce a tensor with the size that it will have."""
    from gguf import GGML_QUANT_SIZES

    n_bytes = torch.Size(shape).numel() // GGML_QUANT_SIZES[kind][0] * GGML_QUANT_SIZES[kind][1]
    writer.add_tensor_info(name, shape, torch.empty(0).numpy().dtype, n_bytes, raw_dtype=kind)


def _add_keys(writer: "GGUFWriter", keys: Mapping[str, object]) -> None:
    """Add metadata by the types of Python: integers have 32 bits without sign, lists of them with one."""
    from gguf import GGUFValueType as Kind

    kinds = {bool: Kind.BOOL, int: Kind.UINT32, float: Kind.FLOAT32, str: Kind.STRING}
    for key, value in keys.items():
        if isinstance(value, list):
            inner = Kind.INT32 if isinstance(value[0], int) else kinds[type(value[0])]
            writer.add_key_value(key, value, Kind.ARRAY, sub_type=inner)
        else:
            writer.add_key_value(key, value, kinds[type(value)])
