"""Served adapters: which adapter each name stands for, while adapters are loaded, replaced and deleted.

The engine knows adapters by names of its own: one that replaces another gets a new one, so a request that has begun keeps the
weights that it began with. The old adapter leaves the model after its last request.
"""

import asyncio
import logging
import re
import time
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path

from genai_pl.errors import UserError
from genai_pl.loading import refuse_twice, resolve_adapter
from genai_pl.peft import read_method
from genai_pl.serving.engine.engine import Engine
from genai_pl.serving.engine.request import QueueFull
from genai_pl.serving.errors import ApiError, too_busy
from genai_pl.serving.response_cache import folder_hash

log = logging.getLogger("genai_pl.access")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,63}")
VIRTUAL = ("PROMPT_TUNING", "PREFIX_TUNING")  # decide at the start how requests are batched


@dataclass(frozen=True)
class ServedAdapter:
    """One adapter.

    name: of clients. key: of the engine. folder: its files. digest: hash of them, for keys of caches. since: Unix time in
    seconds when it was loaded.
    """

    name: str
    key: str
    folder: Path
    digest: str
    since: int


class InUse:
    """The adapters that one HTTP request has named: each stays the same, and in memory, until `release`."""

    def __init__(self) -> None:
        self.by_name: dict[str, ServedAdapter] = {}
        self.releases: list[Callable[[], None]] = []

    def release(self) -> None:
        """Let go of all of them."""
        for release in self.releases:
            release()
        self.releases.clear()


IN_USE: ContextVar[InUse] = ContextVar("adapters")  # of the current request, set by the middleware


class ServedAdapters:
    """Adapters by the names of clients.

    engine: loads and unloads them; None for a model without
    folders: those that are loaded already, by name, which is also the engine's
    checkpoint, base: path and name of the model; root: folder below which others may be loaded, None for none

    `load` and `delete` take turns; all methods are called in the event loop.
    """

    def __init__(
        self, engine: Engine | None, folders: Mapping[str, Path], *, checkpoint: Path, base: str, root: str | None
    ) -> None:
        self.engine, self.checkpoint, self.base = engine, checkpoint, base
        self.root = None if root is None else Path(root).resolve()
        now = int(time.time())
        found = [ServedAdapter(name, name, folder, folder_hash(folder), now) for name, folder in folders.items()]
        self.by_name = {adapter.name: adapter for adapter in found}
        self.digests = {adapter.key: adapter.digest for adapter in found}
        self.numbers = count(2)
        self.turn = asyncio.Lock()

    def find(self, name: str) -> ServedAdapter | None:
        """The adapter of a name, None for an unknown one; for a request it stays the same until its end."""
        in_use = IN_USE.get(None)
        if in_use is not None and name in in_use.by_name:
            return in_use.by_name[name]
        adapter = self.by_name.get(name)
        if adapter is not None and in_use is not None:
            in_use.by_name[name] = adapter
            self.engine.use_adapter(adapter.key, 1)
            in_use.releases.append(partial(self.engine.use_adapter, adapter.key, -1))
        return adapter

    async def load(self, name: str, path: str) -> bool:
        """Serve the adapter of a folder under a name, from the next request on; True if it replaces another.

        Raises ApiError 403 for a path outside of the root, 404 for a folder without an adapter, 422 for one that does not fit
        the model or a name that cannot be used, 409 if its files change meanwhile.
        """
        if name == self.base or not NAME.fullmatch(name):
            fix = (
                "the model has it"
                if name == self.base
                else "take 1 to 64 of A-Z a-z 0-9 . _ : - after a letter or digit"
            )
            raise ApiError(422, f"name={name}: {fix}", param="name")
        async with self.turn:
            folder = await asyncio.to_thread(self._folder, path)
            key = name
            while key in self.digests:
                key = f"{name}#{next(self.numbers)}"
            digest = await asyncio.to_thread(folder_hash, folder)
            try:
                await asyncio.wrap_future(self.engine.load_adapter(key, str(folder)))
            except QueueFull as busy:
                raise too_busy(busy.retry_after) from None
            except UserError as error:
                raise ApiError(422, f"path={path}: {error}", param="path") from None
            if digest != await asyncio.to_thread(folder_hash, folder):
                self.engine.retire_adapter(key)
                raise ApiError(409, f"path={path}: its files changed while they were read: load it again", param="path")
            replaced = self.by_name.get(name)
            self.digests[key] = digest
            self.by_name[name] = ServedAdapter(name, key, folder, digest, int(time.time()))
            if replaced is not None:
                self.engine.retire_adapter(replaced.key)
            log.info("adapter loaded", extra={"fields": {"adapter": name, "folder": str(folder)}})
            return replaced is not None

    async def delete(self, name: str) -> None:
        """Serve an adapter no more; requests that have begun with it go on. Raises ApiError 404 for an unknown name."""
        async with self.turn:
            if name not in self.by_name:
                raise ApiError(404, f"name={name}: no such adapter; there is: {', '.join(self.by_name) or 'none'}")
            self.engine.retire_adapter(self.by_name.pop(name).key)
            log.info("adapter deleted", extra={"fields": {"adapter": name}})

    def _folder(self, path: str) -> Path:
        """The folder with the adapter, none of whose files is outside of the root."""
        outside = ApiError(403, f"path={path}: not in adapters_root={self.root}", param="path")
        try:
            place = (self.root / path).resolve()
            if not place.is_relative_to(self.root):
                raise outside
            if not place.is_dir():
                raise ApiError(404, f"path={path}: no such folder in adapters_root={self.root}", param="path")
            try:
                folder = resolve_adapter(str(place), option="path")
            except UserError as error:
                raise ApiError(404, str(error), param="path") from None
            if not all(each.resolve().is_relative_to(self.root) for each in (folder, *folder.iterdir())):
                raise outside
            refuse_twice(self.checkpoint, folder, message=f"path={path}: the model")
            kind, options = read_method(folder)
        except (ValueError, OSError):  # a NUL, half a surrogate pair, a name that is too long
            raise ApiError(422, "path: not the name of a folder", param="path") from None
        except UserError as error:
            raise ApiError(422, str(error), param="path") from None
        # what would change the model for requests that run
        if kind in VIRTUAL:
            raise ApiError(422, f"path={path}: virtual tokens are loaded at the start alone, by adapter=", param="path")
        if options.get("quantize"):
            fix = f"of a base in {options['quantize']}, which only the start can change: give it by adapter="
            raise ApiError(422, f"path={path}: {fix}", param="path")
        return folder
