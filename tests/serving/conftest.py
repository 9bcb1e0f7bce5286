"""Fixtures of the serving tests: a tiny model, and a client of a server in front of it."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import httpx


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model that continues at most 128 bytes."""
    from tests.serving.servers import write_model

    return write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def client(tiny: Path) -> Iterator["httpx.Client"]:
    """A client of a server in front of the tiny model."""
    from genai_pl.serving.settings import Limits
    from tests.serving.servers import make_service, serving

    with serving(make_service(tiny, limits=Limits(max_tokens=64, max_body_mib=0.25))) as client:
        yield client
