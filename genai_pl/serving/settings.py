"""Settings of a server: plain data, which worker processes read as JSON from their environment.

cli/serve.py makes them from conf/serve.yaml, which explains each option; gunicorn users write the JSON themselves. Nothing
here imports torch, so the parent of several workers stays small.
"""

import atexit
import json
import math
import os
import secrets
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from genai_pl.config.generation import GenerationConfig
from genai_pl.config.redaction import redact
from genai_pl.devices import CODES
from genai_pl.errors import ConfigError

VARIABLE = "GENAI_PL_SERVE"  # environment variable with the settings of workers, as JSON
CACHE_KEY = "GENAI_PL_CACHE_KEY"  # secret that signs entries of a shared cache
KEYS = "GENAI_PL_API_KEYS"  # API keys of clients, separated by commas
ADMIN_KEYS = "GENAI_PL_ADMIN_KEYS"  # keys of the admin routes, likewise
FOLDER = "PROMETHEUS_MULTIPROC_DIR"  # read by prometheus_client when it is imported
BACKENDS = ("local", "onnx", "openai")
DTYPES = ("fp32", "bf16", "fp16", *CODES)


@dataclass(frozen=True)
class Limits:
    """Limits of requests; what exceeds one is an error that names the option.

    queue_size: requests that wait, in each queue (429)
    timeout: seconds of a request (504)
    max_tokens: to generate in one answer
    max_n: answers to one request, prompts times n
    max_inputs: texts to embed or score in one request
    max_input_tokens: tokens of these texts together
    max_body_mib: size of a request body (413)
    stored_mib: responses kept for previous_response_id
    """

    queue_size: int = 64
    timeout: float = 120.0
    max_tokens: int = 4096
    max_n: int = 16
    max_inputs: int = 256
    max_input_tokens: int = 131_072
    max_body_mib: float = 4.0
    stored_mib: float = 16.0

    def __post_init__(self) -> None:
        _check_finite(self)
        for option in fields(self):
            if not getattr(self, option.name) > 0:
                raise ConfigError(f"{option.name}={getattr(self, option.name)} must be above 0")


@dataclass(frozen=True)
class Settings:
    """One server: its model or upstream server, cache, limits and address.

    checkpoint, adapters, name: model, adapter folder by name, and the name that clients use for the base
    host, port, workers: address (port 0: any free one) and number of processes
    reuse_port: another server may listen at the same address, for restarts
    backend: local, onnx, or openai for a server at `url` with the API key in the environment variable `key_variable`
    cache, cache_ttl, cache_mib: memory, a Redis URL or None; seconds of an entry; size of the memory cache
    slots, max_length: requests that run at once; tokens of prompt and answer together, None for the model's context
    prefill_chunk: prompt tokens read between two decode steps, None for the device's default
    prefix_cache_mib: MiB of keys and values kept for prompts that begin like earlier requests, 0 for none
    pooling: of embeddings, None for the folder's own
    device, dtype: where and in which of DTYPES the weights are
    requests_per_minute, tokens_per_minute: of each client, None for no limit
    log_format: text, or json for one object a line, with a line for each request
    otlp_endpoint: URL of an OpenTelemetry collector that gets traces, None for none
    adapters_root, admin_keys: folder below which adapters may be loaded while the server runs, file with keys for that
    api_keys: file with accepted keys; cors_origins: web origins that may call the API
    drain: seconds that running requests have after SIGTERM
    generation: sampling settings of requests that do not set them
    """

    checkpoint: str = "auto"
    adapters: dict[str, str] = field(default_factory=dict)
    name: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    workers: int = 1
    reuse_port: bool = False
    backend: str = "local"
    url: str | None = field(default=None, repr=False)  # may hold a password, as cache may
    key_variable: str = "OPENAI_API_KEY"
    cache: str | None = field(default="memory", repr=False)
    cache_ttl: float = 3600.0
    cache_mib: float = 64.0
    slots: int = 8
    max_length: int | None = None
    prefill_chunk: int | None = None
    prefix_cache_mib: float = 512.0
    pooling: str | None = None
    device: str = "auto"
    dtype: str = "fp32"
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    log_format: str = "text"
    otlp_endpoint: str | None = field(default=None, repr=False)
    adapters_root: str | None = None
    admin_keys: str | None = None
    api_keys: str | None = None
    cors_origins: list[str] = field(default_factory=list)
    drain: float = 30.0
    limits: Limits = field(default_factory=Limits)
    generation: dict[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # one message for each option that cannot work, with the option's name; URLs are masked, they may hold passwords
        _check_finite(self)
        if not self.host:
            raise ConfigError("host is empty: 127.0.0.1 is this machine alone, 0.0.0.0 any that reaches it")
        if self.backend not in BACKENDS:
            raise ConfigError(f"backend={self.backend} is not one of {', '.join(BACKENDS)}")
        if self.backend == "openai" and not (self.url or "").startswith(("http://", "https://")):
            raise ConfigError(f"backend=openai needs url=http://HOST:PORT/v1, not {redact(self.url)}")
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype={self.dtype} is not one of {', '.join(DTYPES)}")
        if self.dtype in CODES and self.adapters:
            raise ConfigError(
                f"dtype={self.dtype} takes no adapter: merge it first (export.py format=merged), or leave dtype out"
            )
        is_cache = self.cache in (None, "memory") or self.cache.startswith(("redis://", "rediss://", "unix://"))
        if not is_cache:
            raise ConfigError(f"cache={redact(self.cache)} is not null, memory or redis://HOST:PORT/DB")
        for name in ("workers", "slots", "cache_ttl", "cache_mib", "drain"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}={getattr(self, name)} must be above 0")
        if self.prefix_cache_mib < 0:
            raise ConfigError(f"prefix_cache_mib={self.prefix_cache_mib} must be at least 0 (0: no prefix cache)")
        if self.prefill_chunk is not None and self.prefill_chunk < 1:
            raise ConfigError(f"prefill_chunk={self.prefill_chunk} must be at least 1")
        for name in ("requests_per_minute", "tokens_per_minute"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ConfigError(f"{name}={value} must be above 0, or null for no limit")
        if self.adapters_root is not None:
            self._check_reload()
        elif self.admin_keys is not None:
            raise ConfigError("admin_keys: there is nothing to do with them without adapters_root=FOLDER")
        if self.backend == "openai" and self.tokens_per_minute is not None:
            raise ConfigError("tokens_per_minute: backend=openai does not count tokens; set requests_per_minute")
        if self.log_format not in ("text", "json"):
            raise ConfigError(f"log_format={self.log_format} is not one of text, json")
        if self.otlp_endpoint is not None and not self.otlp_endpoint.startswith(("http://", "https://")):
            raise ConfigError(f"otlp_endpoint={redact(self.otlp_endpoint)} is not http://HOST:4318")
        if not 0 <= self.port < 65536:
            raise ConfigError(f"port={self.port} must lie between 0 and 65535")
        if (defaults := self.defaults).num_beams > 1 or defaults.speculates:
            raise ConfigError(
                "generation: serving draws one token at a time; leave out num_beams, draft, prompt_lookup"
            )

    def _check_reload(self) -> None:
        """ConfigError where adapters cannot be loaded while the server runs."""
        root = self.adapters_root
        if self.backend != "local":
            raise ConfigError(f"adapters_root={root}: backend={self.backend} has no adapters; leave it out")
        if self.dtype in CODES:
            raise ConfigError(f"adapters_root={root}: dtype={self.dtype} takes no adapter; leave one of them out")
        if self.workers > 1:
            raise ConfigError(f"adapters_root={root}: a request reaches one of workers={self.workers}; set workers=1")
        if not Path(root).is_dir():
            raise ConfigError(f"adapters_root={root}: no such folder")

    @property
    def defaults(self) -> GenerationConfig:
        """Sampling settings of requests that do not set them."""
        return GenerationConfig(**self.generation)

    def to_json(self) -> str:
        """JSON that `from_json` reads."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Settings":
        """Settings of JSON, which may leave out any of them; ConfigError for an unknown name or a wrong value."""
        try:
            values = json.loads(text)
            return cls(**{**values, "limits": Limits(**values.get("limits", {}))})
        except (ValueError, TypeError, AttributeError) as error:
            raise ConfigError(f"{VARIABLE}: not the settings of a server ({error})") from None


def _check_finite(options: Limits | Settings) -> None:
    """ConfigError for an option that is infinite or no number."""
    for option in fields(options):
        value = getattr(options, option.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{option.name}={value} must be a finite number")


def read_admin_keys(settings: Settings, keys: Sequence[str]) -> list[str]:
    """Accepted keys of the admin routes, none without a folder to load from; ConfigError for no key, or one that is in keys."""
    if settings.adapters_root is None:
        return []
    admin_keys = read_keys(settings.admin_keys, variable=ADMIN_KEYS, option="admin_keys")
    if not admin_keys:
        raise ConfigError(f"adapters_root={settings.adapters_root}: needs a key: admin_keys=FILE or {ADMIN_KEYS}=key")
    if set(admin_keys) & set(keys):
        raise ConfigError("admin_keys: one of them is in api_keys as well; choose another")
    return admin_keys


def read_keys(path: str | None, *, variable: str = KEYS, option: str = "api_keys") -> list[str]:
    """Accepted keys: of the environment variable and of the file's lines (# begins a comment); none: no key needed.

    Raises ConfigError for a file that cannot be read or has no key, which would open the server by mistake.
    """
    keys = [key.strip() for key in os.environ.get(variable, "").split(",")]
    if path is not None:
        try:
            keys += [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{option}={path}: cannot be read ({error})") from None
    keys = [key for key in keys if key and not key.startswith("#")]
    if path is not None and not keys:
        raise ConfigError(f"{option}={path}: no key in it; write one a line")
    return keys


def share_between_processes() -> None:
    """Set the environment that workers share: a folder for their metrics, removed with this process, and the cache secret."""
    cache_secret()
    if FOLDER not in os.environ:
        os.environ[FOLDER] = tempfile.mkdtemp(prefix="genai_pl-metrics-")
        atexit.register(_remove_for, os.getpid(), os.environ[FOLDER])


def cache_secret() -> bytes:
    """Secret that signs cache entries: CACHE_KEY of the environment, which is set to a random one if it is missing."""
    return os.environ.setdefault(CACHE_KEY, secrets.token_hex(32)).encode()


def _remove_for(process: int, folder: str) -> None:
    if os.getpid() == process:  # forked workers inherit the exit handler, and must not run it
        shutil.rmtree(folder, ignore_errors=True)
