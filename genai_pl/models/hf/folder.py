"""Files of a model folder: JSON and safetensors, whole or sharded; a file that cannot be read is a CheckpointError of one line.

Tensors are read one at a time from mapped files, so that loading needs the memory of the model and one tensor.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from genai_pl.errors import CheckpointError, ConfigError
from genai_pl.models.hf.quantized import PackedWeight, packed_weights, plain_names

if TYPE_CHECKING:
    from safetensors import safe_open

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# buffers in old files that no model reads: causal masks, position numbers, rotary frequencies
BUFFERS = (".attn.bias", ".attn.masked_bias", "position_ids", "rotary_emb.inv_freq", "token_type_ids")
PREFIXES = ("transformer.", "model.", "bert.", "roberta.", "albert.")


def read_json(path: Path) -> dict:
    """The object in a JSON file; CheckpointError if there is no file, no JSON, or no object."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent}: no {path.name} in it") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: an object is needed, not {type(values).__name__}")
    return values


def write_json(path: Path, values: dict[str, object]) -> None:
    """Write an object as indented JSON with sorted keys."""
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


class TensorFiles:
    """The tensors of a folder, by name, in one safetensors file or in the shards of an index, read one at a time.

    folder: where they are. prefix: what names in a model with a head begin with ("transformer."): a file of the headless
    model leaves it out, and is found under both names. `files`: the path of each tensor by its name in the file.
    """

    def __init__(self, folder: Path, prefix: str = "") -> None:
        self.folder = folder
        self.files = _files_by_tensor(folder)
        self.read_names: set[str] = set()  # for `unused`
        self._unpacking = False
        self._known: dict[str, str] = {}
        self._shapes: dict[Path, dict[str, tuple[int, ...]]] = {}
        plain = {_renamed(name): name for name in self.files}
        # a name with and without the prefix is one tensor; a name as it stands comes first
        for name, stored in plain.items() if prefix else ():
            self._known |= {f"{prefix}{name}": stored, name.removeprefix(prefix): stored}
        self._known |= plain
        # tensors of quantized weights stand for those
        config = folder / "config.json"
        options = read_json(config).get("quantization_config") if config.is_file() else None
        try:
            self._packed: dict[str, PackedWeight] = packed_weights(options, self._known.keys(), self)
        except (ConfigError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{config}: quantization_config: {error}") from None

    def __contains__(self, name: str) -> bool:
        return name in self._known or name in self._packed

    @property
    def is_packed(self) -> bool:
        """True if weights are quantized: several tensors of the files stand for one."""
        return bool(self._packed)

    def weights(self) -> list[str]:
        """Names of the weights, each once: of plain tensors as in the files, and of packed ones."""
        return [*plain_names(self.files, self._packed.values()), *self._packed]

    def alias(self, name: str, other: str) -> None:
        """Let `name` stand for the tensor `other`."""
        self._known[name] = self._known[other]

    def read(self, name: str) -> Tensor:
        """The tensor of this name, a quantized one as plain numbers; CheckpointError if it is missing."""
        if name in self._packed and not self._unpacking:
            return self._unpack(name, PackedWeight.read)
        stored = self._stored(name)
        self.read_names.add(stored)
        with _opened(self.files[stored]) as file:
            return file.get_tensor(stored)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, from the header of its file; CheckpointError if it is missing."""
        if name in self._packed and not self._unpacking:
            return self._unpack(name, PackedWeight.shape)
        stored = self._stored(name)
        path = self.files[stored]
        if path not in self._shapes:
            with _opened(path) as file:
                self._shapes[path] = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        if stored not in self._shapes[path]:
            raise CheckpointError(f"{path}: tensor {stored} is missing, which {INDEX} says to be here")
        return self._shapes[path][stored]

    def dtype(self, name: str) -> torch.dtype:
        """The dtype in which a tensor is stored, or that of its numbers if it is quantized."""
        if name in self._packed:
            return self._packed[name].dtype
        return self.read(name).dtype  # the mapped file: no byte of the tensor is read

    def equal(self, name: str, other: str) -> bool:
        """True if two tensors have the same shape and numbers."""
        if self.shape(name) != self.shape(other):
            return False
        first, second = self.read(name), self.read(other)
        dtype = torch.promote_types(first.dtype, second.dtype)
        return torch.equal(first.to(dtype), second.to(dtype))

    def unused(self) -> list[str]:
        """Names of tensors that were not read, without the buffers of old files."""
        return [name for name in self.files if name not in self.read_names and not name.endswith(BUFFERS)]

    def _unpack(self, name: str, function: Callable[[PackedWeight], Any]) -> Any:
        """What a function finds of a packed weight, whose tensors it sees as they are stored."""
        packed, self._unpacking = self._packed[name], True
        self.read_names.update(self._known[part] for part in packed.beside)
        try:
            return function(packed)
        except CheckpointError as error:
            raise CheckpointError(f"{self.folder}: {name}: {error}") from None
        except (RuntimeError, IndexError, KeyError, TypeError, ValueError) as error:  # of tensors of any shape
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(f"{self.folder}: {name}: its packed tensors do not fit ({reason})") from None
        finally:
            self._unpacking = False

    def _stored(self, name: str) -> str:
        """The name in the file."""
        if name not in self._known:
            raise CheckpointError(f"{self.folder}: tensor {name} is missing")
        return self._known[name]


def write_tensors(tensors: Iterable[tuple[str, Tensor]], folder: Path, *, max_shard_bytes: int) -> None:
    """Write one safetensors file, or shards of at most max_shard_bytes with an index; one shard is in memory at a time.

    tensors: names and tensors in the order of the file, produced as they are written. Names and layout of shards are those
    of transformers.
    """
    from safetensors.torch import save_file

    shards: list[Path] = []
    shard_of: dict[str, int] = {}
    shard_tensors: dict[str, Tensor] = {}
    total = size = 0

    def flush() -> None:
        """Write the tensors at hand as a shard."""
        shards.append(folder / f"shard-{len(shards)}.safetensors")
        save_file(shard_tensors, shards[-1], metadata={"format": "pt"})
        shard_tensors.clear()

    for name, tensor in tensors:
        if shard_tensors and size + tensor.nbytes > max_shard_bytes:
            flush()
            size = 0
        shard_tensors[name], shard_of[name] = tensor, len(shards)
        size, total = size + tensor.nbytes, total + tensor.nbytes
    flush()
    # names of shards state their number, which is known only now
    if len(shards) == 1:
        shards[0].rename(folder / WEIGHTS)
        return
    names = [f"model-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, len(shards) + 1)]
    for shard, name in zip(shards, names, strict=True):
        shard.rename(folder / name)
    weight_map = {name: names[shard] for name, shard in shard_of.items()}
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _renamed(name: str) -> str:
    """The name of a tensor today: old files call weight and bias of a norm gamma and beta."""
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def _files_by_tensor(folder: Path) -> dict[str, Path]:
    """The file of each tensor; one file of weights comes before an index of others, as in transformers."""
    shards = _shards(folder) if (folder / INDEX).exists() else None
    has_single_file = (folder / WEIGHTS).exists()
    if shards is not None and not (
        has_single_file and shards and all(p.exists() and p.name != WEIGHTS for p in shards.values())
    ):
        return shards
    if not has_single_file:
        raise CheckpointError(f"{folder}: no {WEIGHTS} in it (other formats: convert them with transformers)")
    with _opened(folder / WEIGHTS) as file:
        return dict.fromkeys(file.keys(), folder / WEIGHTS)


def _shards(folder: Path) -> dict[str, Path]:
    """The file of each tensor by the index."""
    shards = read_json(folder / INDEX).get("weight_map", {})
    if not isinstance(shards, dict) or not all(isinstance(file, str) for file in shards.values()):
        raise CheckpointError(f"{folder / INDEX}: weight_map must give the file of each tensor by its name")
    return {name: folder / file for name, file in shards.items()}


@contextmanager
def _opened(path: Path) -> "Iterator[safe_open]":
    """The mapped file; CheckpointError if it is truncated, empty or no safetensors file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from None
