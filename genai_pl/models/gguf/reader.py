"""GGUF files, read: metadata, and tensors by the names of llama.cpp, one at a time and dequantized to float32."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from genai_pl.config.enums import AttentionBackend
from genai_pl.config.model import ModelConfig
from genai_pl.errors import CheckpointError, ConfigError
from genai_pl.models.build import Model
from genai_pl.models.gguf.architectures import Architecture
from genai_pl.models.gguf.metadata import NAME, Keys, read_metadata
from genai_pl.models.gguf.package import gguf_package
from genai_pl.models.gguf.rope import FACTORS
from genai_pl.models.hf.config import check_blocks
from genai_pl.models.hf.weights import load_tensors

if TYPE_CHECKING:
    from gguf import GGUFReader
    from gguf.gguf_reader import ReaderTensor

PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class GgufFile:
    """A GGUF file, its tensors by llama.cpp's names. keys: metadata. folder: the file itself, for messages."""

    def __init__(self, file: Path) -> None:
        self.folder = file
        reader = _opened(file)
        self.keys: Keys = {name: field.contents() for name, field in reader.fields.items()}
        self.tensors: dict[str, ReaderTensor] = {tensor.name: tensor for tensor in reader.tensors}
        self.read_names: set[str] = set()
        if "token_embd.weight" in self.tensors:
            rows = self.shape("token_embd.weight")[0]
            self.keys.setdefault(f"{self.keys.get(NAME)}.vocab_size", rows)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor in torch's order; CheckpointError if it is missing."""
        return tuple(int(n) for n in reversed(self._tensor(name).shape))

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that a tensor is stored in; float32 for quantized numbers."""
        return PLAIN.get(self._tensor(name).tensor_type.name, torch.float32)

    def read(self, name: str) -> Tensor:
        """The tensor in its own dtype, quantized numbers in float32."""
        from gguf import quants

        tensor, kind = self._tensor(name), self._tensor(name).tensor_type
        self.read_names.add(name)
        try:
            numbers = torch.from_numpy(quants.dequantize(tensor.data, kind).copy())
        except NotImplementedError:
            raise CheckpointError(
                f"{self.folder}: tensor {name} is in {kind.name}, which the package gguf does not read; "
                "llama-quantize --allow-requantize FILE OUT f16 makes a file that it does"
            ) from None
        return numbers.reshape(self.shape(name)).to(self.dtype(name))

    def unused(self) -> list[str]:
        """Names of tensors that were not read."""
        return [name for name in self.tensors if name not in self.read_names]

    def description(self) -> tuple[ModelConfig, Architecture]:
        """The configuration and the architecture of the file; CheckpointError if our model cannot be it."""
        try:
            _check_model(self.keys)
            factors = self.read(FACTORS) if FACTORS in self.tensors else None
            config, architecture = read_metadata(self.keys, self.tensors, factors)
            check_blocks(config, [f"blocks.{name.removeprefix('blk.')}" for name in self.tensors])
        except KeyError as error:
            raise CheckpointError(f"{self.folder}: {self.keys.get(NAME)}.{error.args[0]} is missing") from None
        except CheckpointError as error:
            raise CheckpointError(f"{self.folder}: {error}") from None
        except (ConfigError, TypeError, ValueError, ArithmeticError) as error:  # of values of any type
            raise CheckpointError(f"{self.folder}: {str(error).splitlines()[0]}") from None
        return self._with_tie(config), architecture

    def _with_tie(self, config: ModelConfig) -> ModelConfig:
        """The configuration, tied where output.weight is the embedding: some architectures need the copy."""
        head, embedding = (self.tensors.get(f"{name}.weight") for name in ("output", "token_embd"))
        same = head is not None and embedding is not None and head.tensor_type == embedding.tensor_type
        if same and head.data.shape == embedding.data.shape and (head.data == embedding.data).all():
            self.read_names.add("output.weight")
            return replace(config, tie_embeddings=True)
        return config

    def _tensor(self, name: str) -> "ReaderTensor":
        if name not in self.tensors:
            raise CheckpointError(f"{self.folder}: tensor {name} is missing")
        return self.tensors[name]


def load_gguf(stored: GgufFile, *, dtype: torch.dtype, attention: AttentionBackend, dropout: float) -> Model:
    """The model of a GGUF file, in evaluation mode; options as in `load_pretrained`."""
    config, architecture = stored.description()
    config = replace(config, attention=attention, dropout=dropout)
    rows = [row for row in architecture.table(config) if row.hf_name not in stored.read_names]
    return load_tensors(config, rows, stored, stored.folder, dtype=dtype)


def stored_gguf_dtypes(stored: GgufFile) -> dict[str, torch.dtype]:
    """The dtype in which a file stores each tensor, by our names."""
    config, architecture = stored.description()
    return {name: stored.dtype(row.hf_name) for row in architecture.table(config) for name in row.names}


def _check_model(keys: Keys) -> None:
    """CheckpointError for a file that holds no model, or a part of one."""
    kind, n_parts = keys.get("general.type", "model"), keys.get("split.count", 0)
    if kind == "adapter":
        raise CheckpointError("a LoRA for llama.cpp, not a model: give the adapter folder that PEFT reads")
    if kind != "model":
        raise CheckpointError(f"a GGUF file of type {kind}, not a model")
    if isinstance(n_parts, int) and n_parts > 1:
        raise CheckpointError(f"one of {n_parts} parts: llama-gguf-split --merge FIRST_PART OUT makes one file")


def _opened(file: Path) -> "GGUFReader":
    """The package's reader; CheckpointError for a file that it cannot read."""
    gguf = gguf_package(f"{file}: a GGUF file, which")
    try:
        return gguf.GGUFReader(file)
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError, OSError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{file}: not readable as GGUF: cut off or damaged ({reason})") from None
