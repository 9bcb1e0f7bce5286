"""Models in object storage: `checkpoint=s3://...` and `init_from=s3://...`, downloaded into a cache once for each version.

An address is that of a Hugging Face or adapter folder, a `.ckpt`, or the copy of a run: then its export, or its newest
checkpoint where that is of a later step, as for a run folder; ADDRESS/best and ADDRESS/last are its checkpoints. Only weights,
configurations and tokenizers are downloaded, as from the hub: no code.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path, PurePosixPath

from genai_pl.atomic_io import ADAPTER, CONTENTS, RESULTS, write_atomic
from genai_pl.callbacks.checkpoint_files import named_step
from genai_pl.callbacks.mirror import BEST
from genai_pl.errors import CheckpointError
from genai_pl.object_storage import below, download, one_at_a_time, one_line, open_storage, version_of

SUFFIXES = (".json", ".safetensors", ".txt", ".model", ".jinja")  # of what is read from a model's folder


def fetch_model(address: str, option: str, *, adapter: bool = False) -> Path:
    """The path in the cache of what an address names; CheckpointError if there is no model. adapter: wanted is one."""
    address = address.rstrip("/")
    there = below(address, option)
    if "" in there or not there:  # a file
        return _fetch_files(address, [""], there, option)
    if ADAPTER in there or "config.json" in there:
        return _fetch_files(address, [name for name in there if name.endswith(SUFFIXES)], there, option)
    if CONTENTS in there:
        return _fetch_files(address, list(there), there, option)
    part = _part_of_run(address, there, option, adapter=adapter)
    if part is None:
        raise CheckpointError(f"{option}={address}: neither a config.json, an {ADAPTER} nor checkpoints there")
    return fetch_model(f"{address}/{part}", option)


def _part_of_run(address: str, there: dict[str, dict], option: str, *, adapter: bool) -> str | None:
    """The folder or checkpoint of a run's copy that stands for its model."""
    newest = max((name for name in _checkpoints(there)), key=lambda name: named_step(Path(name)), default=None)
    exported = next((name for name in (f"adapter/{ADAPTER}", "model/config.json") if name in there), None)
    if exported is None or adapter:
        return str(PurePosixPath(exported).parent) if exported else newest and f"checkpoints/{newest}"
    reached = json.loads(_read(f"{address}/{RESULTS}", option))["step"] if RESULTS in there else 0
    if newest is not None and named_step(Path(newest)) > reached:
        return f"checkpoints/{newest}"
    return str(PurePosixPath(exported).parent)


def fetch_checkpoint(address: str, which: str, option: str) -> Path:
    """The path in the cache of a run's `best` or `last` checkpoint; CheckpointError if there is none."""
    there = below(address, option)
    names = sorted(_checkpoints(there), key=lambda name: named_step(Path(name)))
    name = names[-1] if names else None
    if which == "best":
        name = _read(f"{address}/{BEST}", option).strip() if BEST in there else None
    if name not in names:
        raise CheckpointError(f"{option}={address}/{which}: no such checkpoint there")
    return fetch_model(f"{address}/checkpoints/{name}", option)


def _checkpoints(there: dict[str, dict]) -> set[str]:
    """Names of the checkpoints of a run's copy."""
    paths = [PurePosixPath(name).parts for name in there if name.startswith("checkpoints/step=")]
    return {p[1] for p in paths if len(p) == 2 or p[2:] == (CONTENTS,)}


def _read(address: str, option: str) -> str:
    """The text of a small file."""
    system, path = open_storage(address, option)
    with one_line(address, option, CheckpointError):
        return system.cat_file(path).decode()


def _fetch_files(address: str, names: list[str], there: dict[str, dict], option: str) -> Path:
    """A folder with the files of an address, or the file itself, in the cache under their versions."""
    if names == [""] and not there:
        raise CheckpointError(f"{option}={address}: no such file or folder")
    versions = repr([(name, version_of(name, there[name])) for name in sorted(names)])
    root = cache_folder() / hashlib.blake2b(address.encode(), digest_size=8).hexdigest()
    folder = root / hashlib.blake2b(versions.encode(), digest_size=8).hexdigest()
    path = folder / PurePosixPath(address).name
    with one_at_a_time(root):
        if not path.exists():
            for other in root.iterdir():  # older versions
                if other.is_dir():
                    shutil.rmtree(other, ignore_errors=True)

            def fill(temporary: Path) -> None:
                for name in names:
                    download(f"{address}/{name}" if name else address, temporary / name, option, kind=CheckpointError)

            write_atomic(path, fill)
    return path


def cache_folder() -> Path:
    """The folder of downloaded models, beside the cache of the hub."""
    home = os.environ.get("HF_HOME") or Path("~/.cache/huggingface").expanduser()
    return Path(home) / "genai_pl" / "models"
