"""The typed node of `serve.py`; conf/serve.yaml explains the fields."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Serve:
    """What `serve.py` takes."""

    checkpoint: str = "auto"
    adapter: Any = None
    name: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    workers: int = 1
    device: str = "auto"
    dtype: str = "fp32"
    backend: str = "local"
    url: str | None = None
    key_variable: str = "OPENAI_API_KEY"
    slots: int = 8
    max_length: int | None = None
    pooling: str | None = None
    cache: str | None = "memory"
    cache_ttl: float = 3600.0
    cache_mib: float = 64.0
    queue_size: int = 64
    timeout: float = 120.0
    max_tokens: int = 4096
    max_n: int = 16
    max_inputs: int = 256
    max_body_mib: float = 4.0
    drain: float = 30.0
    api_keys: str | None = None
    cors_origins: list[str] = field(default_factory=list)
    generation: Any = None
