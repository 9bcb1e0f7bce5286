"""Response cache: bytes by key, in memory (least recently used) or in a Redis that several servers share.

A cache never fails a request: what cannot be read or written is a miss. What goes in is encoded by answer_streams.py or
http/upstream.py, which also check what comes out.
"""

import hashlib
import hmac
import json
import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn

from genai_pl.config.redaction import redact
from genai_pl.data import fingerprint
from genai_pl.data.generation_defaults import GENERATION
from genai_pl.errors import ConfigError
from genai_pl.serving.settings import cache_secret

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("genai_pl.serving")
PAUSE = 5.0  # seconds without Redis after a failed call
SIGNATURE_BYTES = 32  # of SHA-256, in front of the value
MAX_ENTRY_BYTES = 64 * 2**20  # that are read of an entry, which others may have written


class Cache(Protocol):
    """Bytes by key.

    get: None for a key that is unknown, expired or unreadable
    set: may keep nothing, silently
    """

    async def get(self, key: str) -> bytes | None: ...
    async def set(self, key: str, value: bytes) -> None: ...
    async def close(self) -> None: ...


def key_of(*parts: object) -> str:
    """Hash (48 hex digits) of JSON values, the same in every process and for every order of dict keys.

    >>> key_of("model", {"a": 1, "b": 2}) == key_of("model", {"b": 2, "a": 1})
    True
    """
    return hashlib.blake2b(json.dumps(parts, sort_keys=True, default=str).encode(), digest_size=24).hexdigest()


def model_hash(model: nn.Module, tokenizer: "PreTrainedTokenizerBase") -> str:
    """Hash of what a model computes: weights as loaded (in their dtype), configuration and tokenizer."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(f"{model.config}{fingerprint(tokenizer)}".encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def folder_hash(folder: Path) -> str:
    """Hash of an adapter's files: `adapter_*` in its folder, and the end tokens of its generation_config.json."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted([*folder.glob("adapter_*"), *folder.glob(GENERATION), *folder.glob("config.json")]):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


class MemoryCache:
    """In-process cache; the least recently used entries leave first.

    limit: bytes of all values together; a larger value is not kept
    ttl: seconds that an entry is valid
    now: clock in seconds
    """

    def __init__(self, *, limit: int, ttl: float, now: Callable[[], float] = time.monotonic) -> None:
        self.limit, self.ttl, self.now = limit, ttl, now
        self.entries: OrderedDict[str, tuple[float, bytes]] = OrderedDict()
        self.size = 0

    async def get(self, key: str) -> bytes | None:
        if key not in self.entries:
            return None
        expires, value = self.entries[key]
        if expires <= self.now():
            self._drop(key)
            return None
        self.entries.move_to_end(key)
        return value

    async def set(self, key: str, value: bytes) -> None:
        if key in self.entries:
            self._drop(key)
        if len(value) > self.limit:
            return
        self.entries[key] = (self.now() + self.ttl, value)
        self.size += len(value)
        while self.size > self.limit:
            self._drop(next(iter(self.entries)))

    async def close(self) -> None:
        self.entries.clear()

    def _drop(self, key: str) -> None:
        self.size -= len(self.entries.pop(key)[1])


class RedisCache:
    """Cache in Redis, shared by all servers that use the same secret.

    url: redis://:PASSWORD@HOST:PORT/DB, rediss:// or unix://
    ttl: seconds that an entry is valid
    now: clock in seconds

    Anyone who reaches that Redis can write there, so entries are signed together with their key (HMAC of RFC 2104 with
    SHA-256) and an entry without the right signature is a miss: nobody can put words into the model's mouth, or move an answer
    to another prompt. After a failed call Redis is left alone for PAUSE seconds; the log says when it fails and returns.
    """

    def __init__(self, url: str, *, ttl: float, now: Callable[[], float] = time.monotonic) -> None:
        from redis.asyncio import Redis
        from redis.exceptions import RedisError

        try:
            self.client = Redis.from_url(url, socket_timeout=1.0, socket_connect_timeout=1.0)
        except (ValueError, TypeError, RedisError):  # not chained: its message may show a part of the password
            raise ConfigError(f"cache={redact(url)}: write redis://:PASSWORD@HOST:PORT/DB") from None
        self.ttl, self.now = ttl, now
        self.secret = cache_secret()
        self.down_until: float | None = None  # while it is set, the last call failed

    async def get(self, key: str) -> bytes | None:
        entry = await self._try(self.client.getrange, f"genai_pl:{key}", 0, MAX_ENTRY_BYTES)
        if not entry:
            return None
        signature, value = entry[:SIGNATURE_BYTES], entry[SIGNATURE_BYTES:]
        if not hmac.compare_digest(signature, self._signature(key, value)):
            log.warning("cache: an entry is not signed with the secret of this server: it does not count")
            return None
        return value

    async def set(self, key: str, value: bytes) -> None:
        signed = self._signature(key, value) + value
        await self._try(self.client.set, f"genai_pl:{key}", signed, px=max(1, int(self.ttl * 1000)))

    async def close(self) -> None:
        await self.client.aclose()

    def _signature(self, key: str, value: bytes) -> bytes:
        return hmac.digest(self.secret, f"{key}:".encode() + value, "sha256")

    async def _try(self, call: Callable, *arguments: object, **options: object) -> bytes | None:
        from redis.exceptions import RedisError, ResponseError

        if self.down_until is not None and self.now() < self.down_until:
            return None
        try:
            value = await call(*arguments, **options)
        except ResponseError as error:  # the key holds another type, or memory is full: the next key may work
            log.warning("cache: Redis refuses (%s)", redact(error))
            return None
        except (RedisError, OSError) as error:
            if self.down_until is None:
                log.warning("cache: Redis does not answer (%s); going on without it", redact(error))
            self.down_until = self.now() + PAUSE
            return None
        if self.down_until is not None:
            log.warning("cache: Redis answers again")
            self.down_until = None
        return value


def make_cache(name: str | None, *, ttl: float, mib: float) -> Cache | None:
    """The cache of the option `cache`: null, "memory" with `mib` MiB, or a Redis URL."""
    if name is None:
        return None
    if name == "memory":
        return MemoryCache(limit=int(mib * 2**20), ttl=ttl)
    return RedisCache(name, ttl=ttl)
