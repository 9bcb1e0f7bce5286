"""Documents to train on, and the run of one process that the others are compared with."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.strategies.processes import SMALL, WHOLE, train, write_documents


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs")
    write_documents(path)
    return path


@pytest.fixture(scope="module")
def reference(folder: Path, request: pytest.FixtureRequest) -> Callable[[str], Path]:
    """The run of one process for one of the module's OBJECTIVES, trained once."""

    def get(objective: str) -> Path:
        run = folder / f"{objective}-one"
        if not run.exists():
            train(folder, *SMALL, *request.module.OBJECTIVES[objective], WHOLE, f"hydra.run.dir={run}")
        return run

    return get
