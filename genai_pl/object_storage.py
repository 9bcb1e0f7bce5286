"""Object storage: files at addresses such as s3://bucket/texts or gs://bucket/run, listed, read and written through fsspec.

fsspec comes with torch; the storage of a protocol is a package of its own (s3fs, gcsfs, adlfs), which reads credentials and
endpoints from where its users keep them: AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, ~/.aws, ... File systems are opened at each
use, because a worker process cannot use that of its parent. Whatever a storage raises becomes one line with the address.
"""

import fcntl
import io
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from genai_pl.errors import ConfigError, DataError, UserError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
PACKAGES = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
}
VERSIONS = ("ETag", "etag", "md5Hash", "content_md5", "generation")  # what storages call a version of contents
CHATTY = ("botocore", "aiobotocore")  # say where they have found endpoint and credentials
TIMES = ("mtime", "LastModified", "last_modified", "created")  # where there is none: when it was written


def is_remote(name: object) -> bool:
    """Whether a name is an address of object storage.

    >>> is_remote("s3://bucket/texts"), is_remote("texts/a.txt"), is_remote(None)
    (True, False, False)
    """
    return isinstance(name, str) and ADDRESS.match(name) is not None


def refuse_remote(value: object, option: str, *, instead: str) -> None:
    """ConfigError for an address where only a folder of this machine can be."""
    if is_remote(value):
        raise ConfigError(f"{option}={value}: not a folder of this machine; {instead}")


def open_storage(address: str, option: str) -> tuple["AbstractFileSystem", str]:
    """The file system of an address, and the path in it; ConfigError names the package that an address needs."""
    from fsspec.core import url_to_fs

    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)
    protocol = address.partition("://")[0].lower()
    options = {"auto_mkdir": True} if protocol in ("file", "local") else {}
    try:
        return url_to_fs(address, **options)
    except ImportError:
        package = PACKAGES.get(protocol)
        how = f"pip install {package}" if package else f"the package of fsspec for {protocol}:// is not installed"
        raise ConfigError(f"{option}={address}: cannot be opened; {how}") from None
    except ValueError:
        known = ", ".join(f"{name}://" for name in ("s3", "gs", "az", "hf", "https"))
        raise ConfigError(
            f"{option}={address}: no such kind of storage; known are {known} and others of fsspec"
        ) from None


@contextmanager
def one_line(address: str, option: str, kind: type[UserError] = DataError) -> Iterator[None]:
    """Context in which whatever a storage raises becomes one line of `kind`, with the option and the reason."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # every storage has errors of its own
        raise kind(f"{option}={address}: {reason(error)}") from None


def reason(error: BaseException) -> str:
    """The first line of a storage's error; its kind, where it says only a path or nothing."""
    if isinstance(error, FileNotFoundError):
        return "no such file or folder"
    if isinstance(error, PermissionError):
        return f"access is denied ({first_words(error)})"
    return first_words(error)


def first_words(error: BaseException) -> str:
    """The first line of an error's message, or the name of its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@dataclass(frozen=True)
class RemoteFile:
    """A file of object storage that is read like a Path: by its suffix, as text or bytes, with its size.

    address: in full. size: bytes. version: what changes with the contents.
    """

    address: str
    size: int
    version: str

    def __str__(self) -> str:
        return self.address

    @property
    def name(self) -> str:
        """The last part of the address."""
        return PurePosixPath(self.address).name

    @property
    def suffix(self) -> str:
        """The end of the name, such as .jsonl."""
        return PurePosixPath(self.address).suffix

    def open_raw(self) -> io.RawIOBase:
        """The bytes of the file, as they are read; a storage's errors become OSErrors."""
        return _Raw(self.address)

    def read_bytes(self) -> bytes:
        """All bytes."""
        with io.BufferedReader(self.open_raw()) as file:
            return file.read()


class _Raw(io.RawIOBase):
    """The bytes of an address, with errors of its storage as OSErrors, whose kinds differ from storage to storage."""

    _file: io.IOBase | None = None  # until it is open

    def __init__(self, address: str) -> None:
        super().__init__()
        with _as_os_error():
            system, path = open_storage(address, "data.path")
            self._file = system.open(path, "rb")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: bytearray) -> int:
        with _as_os_error():
            contents = self._file.read(len(buffer))
        buffer[: len(contents)] = contents
        return len(contents)

    def close(self) -> None:
        if not self.closed and self._file is not None:
            self._file.close()
        super().close()


@contextmanager
def _as_os_error() -> Iterator[None]:
    try:
        yield
    except (OSError, UserError):
        raise
    except Exception as error:  # every storage has errors of its own
        raise OSError(first_words(error)) from error


def find_files(address: str, option: str) -> list[RemoteFile]:
    """The file at an address, all files below it, or those of a glob; DataError if there is none or no access."""
    system, path = open_storage(address, option)
    with one_line(address, option):
        system.invalidate_cache()
        if any(sign in path for sign in "*?["):
            found = system.glob(path, detail=True)
        elif system.isfile(path):
            found = {path: system.info(path)}
        else:
            found = system.find(path, detail=True)
    files = [
        RemoteFile(system.unstrip_protocol(name), int(info.get("size") or 0), version_of(name, info))
        for name, info in sorted(found.items())
        if info.get("type") != "directory"
    ]
    if not files:
        raise DataError(f"{option}={address}: no such file or folder")
    return files


def version_of(path: str, info: Mapping[str, object]) -> str:
    """What changes when the contents of a file do: its tag, else its path and time."""
    tag = next((info[name] for name in VERSIONS if info.get(name)), None)
    time = next((info[name] for name in TIMES if info.get(name)), "")
    time = time.timestamp() if isinstance(time, datetime) else time
    return f"{path}/{time}" if tag is None else str(tag)


def below(address: str, option: str) -> dict[str, dict]:
    """What fsspec knows of each file below a folder, by its path relative to that; {} where nothing is there.

    A file alone is under the name "". Names that would lead out of a folder (`..`) are left out.
    """
    system, path = open_storage(address.rstrip("/"), option)
    with one_line(address, option):
        system.invalidate_cache()
        try:
            found = system.find(path, detail=True)
        except FileNotFoundError:
            return {}
    root = path.strip("/") + "/"
    names = {name.strip("/"): info for name, info in found.items()}
    if names.keys() == {path.strip("/")}:
        return {"": system.info(path)}
    relative = {name.removeprefix(root): info for name, info in names.items() if name.startswith(root)}
    return {name: info for name, info in relative.items() if ".." not in PurePosixPath(name).parts and name}


def download(address: str, path: Path, option: str, *, kind: type[UserError] = DataError) -> None:
    """Write the file at an address to a path, whose folder is made."""
    system, remote = open_storage(address, option)
    path.parent.mkdir(parents=True, exist_ok=True)
    with one_line(address, option, kind):
        system.get_file(remote, str(path))


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Context in which one process of this machine at a time fills a folder: the others find it filled."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".fetching"
    while True:
        lock = path.open("w")
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists() and path.stat().st_ino == os.fstat(lock.fileno()).st_ino:
            break
        lock.close()  # the process before has removed this file, and another may hold a new one
    with lock:
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
