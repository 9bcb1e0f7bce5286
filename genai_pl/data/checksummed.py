"""Checksummed files: cache files with a footer of length and digest, so that damage is found before a file is read.

A cache that is memory-mapped and trained on would turn a truncated or flipped byte into silently different tokens. The
footer (32 bytes: mark, length, XXH3-128 of everything before it) stands at the end, so readers that stop at their own
end of data, such as Arrow streams, need not know of it. XXH3 reads 10 GiB a second: it detects damage, not forgery.
"""

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

FOOTER = struct.Struct("<8sQ16s")  # mark, length in bytes and digest of everything before it
MARK = b"sealed-1"
SETTLING_SECONDS = 2.0  # seconds for which a changed file may change again within one tick of ctime


def digest(path: Path) -> bytes:
    """XXH3 (128 bits) of a file's bytes: detects damage and change, not forgery; 0.1 s per GiB."""
    with naming(path), path.open("rb") as file:
        return _digest(file, path.stat().st_size)


def cached_digest(path: Path) -> bytes:
    """`digest`, computed once as long as device, inode, size and ctime of the file stay the same.

    Only the kernel sets ctime, so copying with old modification times (`cp -p`, `rsync -t`) is noticed like any change.
    """
    status = path.stat()
    if abs(time.time() - status.st_ctime) < SETTLING_SECONDS:
        return digest(path)
    return _settled_digest(path, status.st_dev, status.st_ino, status.st_ctime_ns, status.st_size)


@lru_cache
def _settled_digest(path: Path, *_: int) -> bytes:
    """`digest` under a key; the arguments after the path are that key."""
    return digest(path)


def _digest(file: BinaryIO, length: int) -> bytes:
    """The digest of the next `length` bytes of an open file."""
    state = xxhash.xxh3_128()
    while chunk := file.read(min(length, 1 << 20)):
        state.update(chunk)
        length -= len(chunk)
    return state.digest()


def ensure(path: Path, write: Callable[[Path], object]) -> None:
    """Write the file with `write` unless an intact one exists; a damaged one is written again, with a warning."""
    if path.exists():
        reason = find_damage(path)
        if reason is None:
            return
        log.warning("cache       %s was damaged (%s): built again", path, reason)
    write_checksummed(path, write)


def write_checksummed(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file with `write` to a temporary path, append the footer, flush it and rename it to `path`."""

    def write_with_footer(temporary: Path) -> None:
        write(temporary)
        footer = FOOTER.pack(MARK, temporary.stat().st_size, digest(temporary))
        with temporary.open("ab") as file:
            file.write(footer)

    write_atomic(path, write_with_footer)


def find_damage(path: Path) -> str | None:
    """The reason why a file is not what was written, or None if it is intact."""
    if not path.is_file():
        return "not a file"
    length = path.stat().st_size - FOOTER.size
    if length < 0:
        return "too short"
    with naming(path), path.open("rb") as file:
        contents, footer = _digest(file, length), file.read(FOOTER.size)
    if footer[:8] != MARK or FOOTER.unpack(footer)[1] != length:
        return "its end is missing"
    return None if footer[16:] == contents else "its contents have changed"


def read_checksummed(path: Path) -> bytes:
    """The contents of a checksummed file, without the footer."""
    return path.read_bytes()[: -FOOTER.size]
