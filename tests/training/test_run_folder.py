"""Where a run writes when it is not told."""

from pathlib import Path

import pytest

from genai_pl.ranks import RANK_VARIABLES
from genai_pl.training.output_folders import remove_unstarted, reserve_folder
from tests.conftest import TINY, some


def test_runs_that_start_in_the_same_second_take_folders_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in RANK_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    path = str(tmp_path / "2026-11-24" / "12-00-00")
    assert [reserve_folder(path) for _ in range(3)] == [path, f"{path}-2", f"{path}-3"]
    assert sorted(folder.name for folder in Path(path).parent.iterdir()) == ["12-00-00", "12-00-00-2", "12-00-00-3"]


def test_all_processes_that_torchrun_starts_take_the_same_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    path = str(tmp_path / "12-00-00")
    assert reserve_folder(path) == reserve_folder(path) == path


REFUSED = {
    "data": ("data.path=nowhere",),
    "a value": ("optimizer.lr=abc",),
    "a model": ("model.n_embd=33",),
    "an adapter": ("peft=lora", "peft.rank=0"),
    "an adapter of a new model, and its data": ("peft=lora", "data.path=short.txt"),
    "an option": ("nothing=1",),
    "a dry run": ("dry_run=true",),
    "a sweep": ("-m", "data.path=nowhere", "seed=1,2"),
    "a dry sweep": ("-m", "dry_run=true", "seed=1,2"),
}


@pytest.mark.parametrize("named", [False, True], ids=["unnamed", "named"])
@pytest.mark.parametrize("what", some(REFUSED))
def test_what_is_refused_or_dry_leaves_no_folder(what: str, named: bool, command, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("short")
    flags = [a for a in REFUSED[what] if a.startswith("-")]
    folder = () if not named else ("output_dir=a/b",)
    options = [o for o in TINY if not o.startswith("data.path")]
    result = command("train", *flags, *options, *folder, *(a for a in REFUSED[what] if a not in flags))
    assert (result.status == 0) == ("dry" in what)
    assert "Traceback" not in result.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["short.txt"]


def test_files_of_the_user_stay_where_a_run_in_their_folder_is_refused(command, tmp_path: Path) -> None:
    for name in ("with", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "with" / "base").mkdir()
    (tmp_path / "with" / "base" / "file").write_text("mine")
    (tmp_path / "with" / "train.log").write_text("mine\n")
    for name in ("with", "empty"):
        assert command("train", *TINY, "peft=lora", "data.path=nowhere", f"output_dir={name}").status == 1
    remaining = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    assert remaining == ["empty", "with", "with/base", "with/base/file", "with/train.log"]
    assert (tmp_path / "with" / "train.log").read_text() == "mine\n"


def test_a_refused_resume_changes_nothing_in_the_folder(command, tmp_path: Path) -> None:
    assert command("train", *TINY, "output_dir=run").status == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}
    for mistake in ("data.path=nowhere", "model.n_layer=2", "optimizer.lr=abc"):
        assert command("train", "resume=run", mistake, "trainer.max_steps=9").status in (1, 2)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_a_run_beside_one_that_never_started_keeps_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in RANK_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    path = tmp_path / "outputs" / "12-00-00"
    first, second = reserve_folder(str(path)), reserve_folder(str(path))
    (Path(second) / "train.log").touch()
    remove_unstarted()
    assert not Path(first).exists()
    assert (Path(second) / "train.log").exists()
