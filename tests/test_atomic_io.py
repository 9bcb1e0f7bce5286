"""A reader sees the old file or the new one, whatever happens to the writer."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import genai_pl
from genai_pl.atomic_io import write_atomic


class DiskFullError(OSError):
    pass


def put_file(text: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(text)


def put_folder(text: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        (path / "deep").mkdir(parents=True)
        (path / "deep" / "file").write_text(text)

    return write


def put_half(kind: str, error: BaseException) -> Callable[[Path], None]:
    """Write half of a file or folder, then fail."""

    def write(path: Path) -> None:
        (put_file if kind == "file" else put_folder)("half")(path)
        raise error

    return write


def text_of(path: Path) -> str:
    return (path / "deep" / "file" if path.is_dir() else path).read_text()


PUT = {"file": put_file, "folder": put_folder}
both = pytest.mark.parametrize("kind", PUT)


@both
def test_a_new_path_appears_whole_with_its_parents(kind: str, tmp_path: Path):
    path = tmp_path / "a" / "b" / "model"
    write_atomic(path, PUT[kind]("new"))
    assert text_of(path) == "new"
    assert os.listdir(path.parent) == ["model"]


@both
def test_an_old_path_is_replaced(kind: str, tmp_path: Path):
    path = tmp_path / "model"
    PUT[kind]("old")(path)
    if kind == "folder":
        (path / "stale").write_text("of the old folder")
    write_atomic(path, PUT[kind]("new"))
    assert text_of(path) == "new"
    assert os.listdir(tmp_path) == ["model"]
    assert not (path / "stale").exists()


@both
@pytest.mark.parametrize("error", [DiskFullError("no space left"), KeyboardInterrupt()], ids=["full disk", "Ctrl-C"])
def test_a_failed_writer_leaves_the_old_path_whole_and_nothing_else(kind: str, error: BaseException, tmp_path: Path):
    path = tmp_path / "model"
    with pytest.raises(type(error)):
        write_atomic(path, put_half(kind, error))
    assert os.listdir(tmp_path) == []
    PUT[kind]("old")(path)
    with pytest.raises(type(error)):
        write_atomic(path, put_half(kind, error))
    assert text_of(path) == "old"
    assert os.listdir(tmp_path) == ["model"]


def test_of_two_writers_of_a_new_folder_the_first_one_stays(tmp_path: Path):
    def write(path: Path) -> None:
        put_folder("second")(path)
        put_folder("first")(tmp_path / "new")  # meanwhile, by another process

    write_atomic(tmp_path / "new", write, keep=True)
    assert (tmp_path / "new" / "deep" / "file").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_a_failed_rename_gives_the_old_folder_its_name_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "model"
    put_folder("old")(path)
    rename = Path.rename

    def fail_for_the_new(self: Path, target: Path) -> Path:
        if "tmp-" in self.name:
            raise DiskFullError("no space left")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_for_the_new)
    with pytest.raises(DiskFullError):
        write_atomic(path, put_folder("new"))
    assert text_of(path) == "old"
    assert os.listdir(tmp_path) == ["model"]


def die_while_writing(path: Path, kind: str, moment: str) -> None:
    """Start a writer in another process that is killed, as by the kernel, in the middle of its work."""
    code = f"""
import os, pathlib
from genai_pl.atomic_io import write_atomic

def die(*_):
    os.kill(os.getpid(), 9)

def write(path):
    if {kind!r} == "folder":
        path.mkdir()
        path = path / "file"
    path.write_text("half")
    if {moment!r} == "writing":
        die()

rename = pathlib.Path.rename
if {moment!r} == "between renames":
    pathlib.Path.rename = lambda self, target: die() if "tmp-" in self.name else rename(self, target)
write_atomic(pathlib.Path({str(path)!r}), write)
"""
    root = Path(genai_pl.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env={**os.environ, "PYTHONPATH": str(root)})
    assert done.returncode == -signal.SIGKILL


@both
def test_a_killed_writer_leaves_the_old_path_whole_and_the_next_one_cleans_up(kind: str, tmp_path: Path):
    path = tmp_path / "model"
    PUT[kind]("old")(path)
    die_while_writing(path, kind, "writing")
    assert text_of(path) == "old"
    assert len(os.listdir(tmp_path)) == 2
    write_atomic(path, PUT[kind]("new"))
    assert text_of(path) == "new"
    assert os.listdir(tmp_path) == ["model"]


def test_an_old_folder_is_not_lost_when_the_writer_is_killed_between_two_renames(tmp_path: Path):
    path = tmp_path / "model"
    put_folder("old")(path)
    die_while_writing(path, "folder", "between renames")
    assert not path.exists()
    with pytest.raises(DiskFullError):  # the next writer fails too
        write_atomic(path, put_half("folder", DiskFullError()))
    assert text_of(path) == "old"
    assert os.listdir(tmp_path) == ["model"]


def test_the_temporary_of_a_running_writer_is_left_alone(tmp_path: Path):
    def write(path: Path) -> None:
        path.write_text("first")
        path.with_name(path.name.replace(str(os.getpid()), str(os.getppid()))).write_text("of the parent process")

    write_atomic(tmp_path / "model", write)
    write_atomic(tmp_path / "model", put_file("second"))
    assert len(os.listdir(tmp_path)) == 2
    assert text_of(tmp_path / "model") == "second"


@pytest.mark.parametrize(("kind", "target"), [("file", "file"), ("file", "folder"), ("folder", "folder")])
def test_a_link_is_replaced_and_what_it_points_to_stays(kind: str, target: str, tmp_path: Path):
    PUT[target]("kept")(tmp_path / "target")
    (tmp_path / "last").symlink_to("target")
    write_atomic(tmp_path / "last", PUT[kind]("new"))
    assert text_of(tmp_path / "last") == "new"
    assert text_of(tmp_path / "target") == "kept"
    assert sorted(os.listdir(tmp_path)) == ["last", "target"]


def test_what_a_dead_process_of_the_same_id_left_is_not_mixed_in(tmp_path: Path):
    names = []
    write_atomic(tmp_path / "model", lambda path: (names.append(path.name), path.touch()))
    (tmp_path / names[0]).mkdir()
    (tmp_path / names[0] / "stale").touch()
    (tmp_path / "model").unlink()
    write_atomic(tmp_path / "model", put_folder("new"))
    assert os.listdir(tmp_path / "model") == ["deep"]
