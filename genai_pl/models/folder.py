"""The files of a model folder; what cannot be read is a CheckpointError of one line."""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from genai_pl.errors import CheckpointError

if TYPE_CHECKING:
    from safetensors import safe_open

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PREFIXES = ("transformer.", "model.", "bert.", "roberta.", "albert.")


def read_json(path: Path) -> dict:
    """The object that a JSON file holds."""
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
    """Write an object as indented JSON."""
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def tensor_reader(folder: Path) -> Callable[..., Tensor]:
    """A function from a tensor's name to the tensor, over one safetensors file or the shards of an index.

    It takes a second name, of the tensor to read where the first is missing.
    """
    files = _files_by_tensor(folder)
    # a file of the headless model leaves out the prefix that the model with a head puts before its names
    known = {}
    for name in files:
        plain = name.replace(".gamma", ".weight").replace(".beta", ".bias")  # as old files call those of a norm
        known |= {f"{prefix}{plain}": name for prefix in PREFIXES}
        known |= {plain.removeprefix(prefix): name for prefix in PREFIXES}
        known[plain] = name

    def read(name: str, instead: str | None = None) -> Tensor:
        name = instead if name not in known and instead else name
        if name not in known:
            raise CheckpointError(f"{folder}: tensor {name} is missing")
        with _opened(files[known[name]]) as file:
            return file.get_tensor(known[name])

    return read


def write_tensors(tensors: Iterable[tuple[str, Tensor]], folder: Path, *, max_shard_bytes: int) -> None:
    """Write one safetensors file, or shards of at most that size with an index; one shard is in memory at a time."""
    from safetensors.torch import save_file

    shards: list[Path] = []
    where: dict[str, int] = {}
    held: dict[str, Tensor] = {}
    total = size = 0

    def flush() -> None:
        shards.append(folder / f"shard-{len(shards)}.safetensors")
        save_file(held, shards[-1], metadata={"format": "pt"})
        held.clear()

    for name, tensor in tensors:
        if held and size + tensor.nbytes > max_shard_bytes:
            flush()
            size = 0
        held[name], where[name] = tensor, len(shards)
        size, total = size + tensor.nbytes, total + tensor.nbytes
    flush()
    if len(shards) == 1:
        shards[0].rename(folder / WEIGHTS)
        return
    names = [f"model-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, len(shards) + 1)]
    for shard, name in zip(shards, names, strict=True):
        shard.rename(folder / name)
    weight_map = {name: names[shard] for name, shard in where.items()}
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _files_by_tensor(folder: Path) -> dict[str, Path]:
    if (folder / INDEX).exists():
        shards = read_json(folder / INDEX).get("weight_map", {})
        return {name: folder / file for name, file in shards.items()}
    if not (folder / WEIGHTS).exists():
        raise CheckpointError(f"{folder}: no {WEIGHTS} in it (other formats: convert them with transformers)")
    with _opened(folder / WEIGHTS) as file:
        return dict.fromkeys(file.keys(), folder / WEIGHTS)


@contextmanager
def _opened(path: Path) -> "Iterator[safe_open]":
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from None
