"""Where a run writes when it is not told."""

from pathlib import Path

import pytest

from genai_pl.folders import RANKS, unused_folder


def test_runs_that_start_in_the_same_second_take_folders_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in RANKS:
        monkeypatch.delenv(name, raising=False)
    path = str(tmp_path / "2026-11-24" / "12-00-00")
    assert [unused_folder(path) for _ in range(3)] == [path, f"{path}-2", f"{path}-3"]
    assert sorted(folder.name for folder in Path(path).parent.iterdir()) == ["12-00-00", "12-00-00-2", "12-00-00-3"]


def test_all_processes_that_torchrun_starts_take_the_same_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    path = str(tmp_path / "12-00-00")
    assert unused_folder(path) == unused_folder(path) == path
