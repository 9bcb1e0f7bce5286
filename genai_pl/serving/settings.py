"""What a server is told, as plain data that worker processes read from their environment."""

import atexit
import json
import os
import secrets
import shutil
import tempfile
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from genai_pl.config.generation import GenerationConfig
from genai_pl.config.redaction import redact
from genai_pl.errors import ConfigError

VARIABLE = "GENAI_PL_SERVE"  # where a worker process finds its settings, as JSON
CACHE_KEY = "GENAI_PL_CACHE_KEY"  # a secret of all servers that share a cache, which signs what they keep
KEYS = "GENAI_PL_API_KEYS"  # keys of clients, separated by commas
FOLDER = "PROMETHEUS_MULTIPROC_DIR"  # read by prometheus_client when it is imported
BACKENDS = ("local", "onnx", "openai")
DTYPES = ("fp32", "bf16", "fp16")


@dataclass(frozen=True)
class Limits:
    """What one client, or all together, may ask for."""

    queue_size: int = 64  # requests that wait
    timeout: float = 120.0  # seconds
    max_tokens: int = 4096  # to generate
    max_n: int = 16  # answers to one request: prompts times n
    max_inputs: int = 256  # texts to embed or to score at once
    max_input_tokens: int = 131_072  # of them together
    max_body_mib: float = 4.0

    def __post_init__(self) -> None:
        for option in fields(self):
            if not getattr(self, option.name) > 0:
                raise ConfigError(f"{option.name}={getattr(self, option.name)} must be above 0")


@dataclass(frozen=True)
class Settings:
    """One server: the model or the server behind it, what stands in front, and the address."""

    checkpoint: str = "auto"
    adapters: dict[str, str] = field(default_factory=dict)
    name: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    workers: int = 1
    backend: str = "local"
    url: str | None = field(default=None, repr=False)  # may hold a password, as cache may
    key_variable: str = "OPENAI_API_KEY"
    cache: str | None = field(default="memory", repr=False)
    cache_ttl: float = 3600.0
    cache_mib: float = 64.0
    slots: int = 8
    max_length: int | None = None
    pooling: str | None = None
    device: str = "auto"
    dtype: str = "fp32"
    api_keys: str | None = None
    cors_origins: list[str] = field(default_factory=list)
    drain: float = 30.0
    limits: Limits = field(default_factory=Limits)
    generation: dict[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise ConfigError(f"backend={self.backend} is not one of {', '.join(BACKENDS)}")
        if self.backend == "openai" and not (self.url or "").startswith(("http://", "https://")):
            raise ConfigError(f"backend=openai needs url=http://HOST:PORT/v1, not {redact(self.url)}")
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype={self.dtype} is not one of {', '.join(DTYPES)}")
        known = self.cache in (None, "memory") or self.cache.startswith(("redis://", "rediss://", "unix://"))
        if not known:
            raise ConfigError(f"cache={redact(self.cache)} is not null, memory or redis://HOST:PORT/DB")
        for name in ("workers", "slots", "cache_ttl", "cache_mib", "drain"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}={getattr(self, name)} must be above 0")
        if not 0 <= self.port < 65536:
            raise ConfigError(f"port={self.port} must lie between 0 and 65535")

    @property
    def defaults(self) -> GenerationConfig:
        """How tokens are chosen where a request does not say."""
        return GenerationConfig(**self.generation)

    def to_json(self) -> str:
        """The settings as `from_json` reads them."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Settings":
        """The settings that were written; ConfigError for a name that is none."""
        try:
            values = json.loads(text)
            return cls(**{**values, "limits": Limits(**values.get("limits", {}))})
        except (ValueError, TypeError, AttributeError) as error:
            raise ConfigError(f"{VARIABLE}: not the settings of a server ({error})") from None


def read_keys(path: str | None) -> list[str]:
    """The keys that clients must show one of: the lines of a file, and those in the environment; none: no key is asked for."""
    keys = [key.strip() for key in os.environ.get(KEYS, "").split(",")]
    if path is not None:
        try:
            keys += [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"api_keys={path}: cannot be read ({error})") from None
    keys = [key for key in keys if key and not key.startswith("#")]
    if path is not None and not keys:
        raise ConfigError(f"api_keys={path}: no key in it; write one a line")
    return keys


def share_between_processes() -> None:
    """Make a folder for the numbers of all workers, which goes with this process, and a secret to sign what they keep.

    Both are named to the processes that are started from here.
    """
    cache_secret()
    if FOLDER not in os.environ:
        os.environ[FOLDER] = tempfile.mkdtemp(prefix="genai_pl-metrics-")
        atexit.register(_remove_for, os.getpid(), os.environ[FOLDER])


def cache_secret() -> bytes:
    """What entries of a shared cache are signed with: from the environment, else one for this start of the server."""
    return os.environ.setdefault(CACHE_KEY, secrets.token_hex(32)).encode()


def _remove_for(process: int, folder: str) -> None:
    if os.getpid() == process:  # a worker that was forked inherits what is to be done at the end
        shutil.rmtree(folder, ignore_errors=True)
