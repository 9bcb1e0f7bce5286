"""Sealed files: what a cache keeps, with its length and digest behind it, so that damage is seen before it is read."""

import logging
import struct
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import xxhash

from genai_pl.atomic_io import naming, write_atomic

log = logging.getLogger(__name__)

FOOTER = struct.Struct("<8sQ16s")  # mark, length in bytes and digest of all that stands before it
MARK = b"sealed-1"
SETTLING_SECONDS = 2.0  # seconds after a change in which a file may change again without another time of change


def digest(path: Path) -> bytes:
    """XXH3 (128 bits) of the bytes of a file: against damage and change, not against forgery; 0.1 s a GiB."""
    with naming(path), path.open("rb") as file:
        return _digest(file, path.stat().st_size)


def cached_digest(path: Path) -> bytes:
    """`digest`, for which the file is read once as long as device, inode, size and time of change stay what they were.

    No one but the kernel sets that time: copying with old times (`cp -p`, `rsync -t`) is a change like any other.
    """
    status = path.stat()
    if abs(time.time() - status.st_ctime) < SETTLING_SECONDS:
        return digest(path)
    return _settled_digest(path, status.st_dev, status.st_ino, status.st_ctime_ns, status.st_size)


@lru_cache
def _settled_digest(path: Path, *_: int) -> bytes:
    return digest(path)


def _digest(file: BinaryIO, length: int) -> bytes:
    found = xxhash.xxh3_128()
    while chunk := file.read(min(length, 1 << 20)):
        found.update(chunk)
        length -= len(chunk)
    return found.digest()


def ensure(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write` make the file unless it is there and whole; one that is damaged is made again, and that is said."""
    if path.exists():
        why = find_damage(path)
        if why is None:
            return
        log.warning("cache       %s was damaged (%s): built again", path, why)
    write_checksummed(path, write)


def write_checksummed(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file, seal it, flush it and rename it to `path`."""

    def sealed(temporary: Path) -> None:
        write(temporary)
        seal = FOOTER.pack(MARK, temporary.stat().st_size, digest(temporary))
        with temporary.open("ab") as file:
            file.write(seal)

    write_atomic(path, sealed)


def find_damage(path: Path) -> str | None:
    """Why a file is not what was sealed, or None."""
    if not path.is_file():
        return "not a file"
    length = path.stat().st_size - FOOTER.size
    if length < 0:
        return "too short"
    with naming(path), path.open("rb") as file:
        found, seal = _digest(file, length), file.read(FOOTER.size)
    if seal[:8] != MARK or FOOTER.unpack(seal)[1] != length:
        return "its end is missing"
    return None if seal[16:] == found else "its contents have changed"


def read_checksummed(path: Path) -> bytes:
    """The contents of a sealed file, without the seal."""
    return path.read_bytes()[: -FOOTER.size]
