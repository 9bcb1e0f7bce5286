"""Training checkpoints: reading, checking and writing them; data only, never code.

A checkpoint is one file, or a folder of shards (`sharded.py`). Both hold Lightning's dict (`state_dict`,
`optimizer_states`, `loops`, `callbacks`, ...) and under the key `genai_pl` what this package adds: `format` 1, `model`
(configuration), `tokenizer`, `base` and `peft` of adapters, `rng` by rank, `replicas`.

Whoever sends a checkpoint must not be able to run code here: it is unpickled with `weights_only=True`, and refused
before anything is built from it if its configuration has a `_target_` (Hydra would call it), or more layers than
weights (they would be allocated first). Every refusal is one CheckpointError line that names the file.
"""

from pathlib import Path

import torch

from genai_pl.atomic_io import CONTENTS, write_atomic
from genai_pl.errors import CheckpointError, TrainingError, reason_of

RESUMED = ("global_step", "epoch", "loops", "callbacks", "optimizer_states", "lr_schedulers")  # what a run goes on with
MOST_SHARED = 1000  # layers that one block's weights may stand for
MARK = "genai_pl"  # the key under which a checkpoint carries what is ours


def read_checkpoint(path: Path) -> dict:
    """The contents of a checkpoint file or folder, tensors in RAM; tensors of one file are memory-mapped, read when used.

    CheckpointError if it is truncated, foreign, or holds anything but data.
    """
    contents = read_contents(path)
    if path.is_dir():
        from genai_pl.checkpoints import sharded as shards  # DCP takes half a second to import

        return shards.load_shards(path, contents, {})
    return contents


def read_contents(path: Path) -> dict:
    """The contents of a checkpoint; of a sharded one the names of its tensors in their places, no tensor.

    Enough to know step, configuration and shapes. Errors are those of `read_checkpoint`.
    """
    sharded = path.is_dir()
    try:
        # data only: the unpickler refuses every class that is no tensor or container
        contents = torch.load(path / CONTENTS if sharded else path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except Exception as error:  # torch.load raises whatever its unpickler meets in a broken file
        reason = str(error).split(". ")[0].splitlines()[0] if str(error) else type(error).__name__
        if "weights_only" in str(error) or "Weights only" in str(error):
            reason = "it holds objects that are not data, and would run code to load"
        if "mmap can only be used" in str(error):  # torch's advice is for a program
            reason = "it is no file of torch.save's zip format, as checkpoints are"
        raise CheckpointError(f"{path}: refused, {reason}") from None
    # a checkpoint of this package, whose values are of the expected types and name no code
    if not isinstance(contents, dict) or MARK not in contents:
        raise CheckpointError(f"{path}: refused, not a checkpoint of genai_pl")
    try:
        unsafe = _names_code(contents)
    except RecursionError:
        raise CheckpointError(f"{path}: refused, it is nested too deeply") from None
    if unsafe:
        raise CheckpointError(f"{path}: refused, its stored configuration names code to run (_target_)")
    _check_kinds(path, contents)
    # a folder must hold every shard that its list of tensors names
    if sharded:
        from genai_pl.checkpoints import sharded as shards

        shards.check_shards(path, contents)
    return contents


def write_checkpoint(contents: dict, path: Path) -> None:
    """Write a checkpoint as one file: under a temporary name, flushed, renamed.

    A reader sees the complete new file or the old one. TrainingError where the disk refuses it, with the operating
    system's reason.
    """

    def save(temporary: Path) -> None:
        with temporary.open("wb") as file:
            torch.save(contents, file)

    try:
        write_atomic(path, save)
    except (OSError, RuntimeError) as error:
        reason = reason_of(error) if isinstance(error, OSError) else str(error).splitlines()[0]
        raise TrainingError(f"{path}: the checkpoint could not be written, {reason}") from error


def check_resumable(path: Path, contents: dict) -> None:
    """CheckpointError unless training can go on from the checkpoint at `path`, with `contents` as read.

    A checkpoint of weights only, such as one written for inference, lacks the state of optimizer, loops or generators.
    """
    missing = [name for name in RESUMED if name not in contents] + [
        n for n in ("model", "rng") if n not in contents[MARK]
    ]
    if missing:
        raise CheckpointError(f"{path}: refused, it has no {missing[0]}: no training goes on from it")


def _check_kinds(path: Path, contents: dict) -> None:
    """CheckpointError where a part is not of its type, or the model has more layers than the weights can fill."""
    ours = contents[MARK]
    if not isinstance(ours, dict) or not isinstance(contents.get("state_dict"), dict):
        raise CheckpointError(f"{path}: refused, not a checkpoint of genai_pl")
    kinds = {"global_step": int, "epoch": int, "model": dict, "tokenizer": dict, "base": str, "peft": dict, "rng": list}
    for name, kind in kinds.items():
        value = ours.get(name, contents.get(name))
        if value is not None and not isinstance(value, kind):
            raise CheckpointError(f"{path}: refused, its {name} is not of type {kind.__name__}")
    layers = (ours.get("model") or {}).get("n_layer", 0)
    if isinstance(layers, int) and layers > max(len(contents["state_dict"]), MOST_SHARED):
        raise CheckpointError(f"{path}: refused, it says {layers} layers and has not their weights")


def _names_code(value: object) -> bool:
    """Whether a `_target_` key stands anywhere in nested dicts and lists."""
    if isinstance(value, dict):
        return "_target_" in value or any(_names_code(v) for v in value.values())
    if isinstance(value, list | tuple):
        return any(_names_code(v) for v in value)
    return False
