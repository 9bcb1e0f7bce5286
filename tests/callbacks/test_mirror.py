"""The copy of a run folder, in fsspec's memory: what is there after each checkpoint, and how often the address is listed."""

from pathlib import Path

import fsspec
import pytest

from genai_pl.callbacks import mirror
from genai_pl.callbacks.mirror import Mirror

ADDRESS = "memory://bucket/run"


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> fsspec.AbstractFileSystem:
    system = fsspec.filesystem("memory")
    monkeypatch.setattr(type(system), "store", {})
    monkeypatch.setattr(type(system), "pseudo_dirs", [""])
    return system


@pytest.fixture
def listings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Addresses that were listed."""
    seen: list[str] = []
    below = mirror.below
    monkeypatch.setattr(mirror, "below", lambda address, option: seen.append(address) or below(address, option))
    return seen


def save(run: Path, step: int, *, keep: int) -> None:
    """A checkpoint of a step, after which the oldest are removed."""
    folder = run / "checkpoints"
    folder.mkdir(exist_ok=True)
    (folder / f"step={step:06d}.ckpt").write_bytes(bytes([step]))
    for old in sorted(folder.iterdir())[:-keep]:
        old.unlink()


def copied(system: fsspec.AbstractFileSystem) -> list[int]:
    """Steps of the checkpoints at the address."""
    return [int(name[-11:-5]) for name in sorted(system.store) if "/checkpoints/" in name]


def test_the_address_is_listed_once_however_many_checkpoints_there_are(store, listings, tmp_path: Path) -> None:
    (tmp_path / "train.log").write_text("step 0")
    copy = Mirror(tmp_path, ADDRESS)
    copy.begin()
    for step in range(1, 6):
        save(tmp_path, step, keep=2)
        copy.start()
        copy.wait()
        assert copied(store) == [n for n in (step - 1, step) if n]
    copy.finish()
    assert listings == [ADDRESS]
    assert store.cat("/bucket/run/checkpoints/step=000005.ckpt") == bytes([5])


def test_a_run_that_goes_on_removes_what_the_one_before_it_left(store, listings, tmp_path: Path) -> None:
    save(tmp_path, 1, keep=2)
    Mirror(tmp_path, ADDRESS).finish()
    store.pipe("/bucket/run/checkpoints/step=000007.ckpt", b"set aside since")
    store.pipe("/bucket/run/checkpoints/best.txt", b"step=000001.ckpt")
    again = Mirror(tmp_path, ADDRESS)
    again.begin()
    again.finish()
    assert [name.removeprefix("/bucket/run/") for name in sorted(store.store) if "/checkpoints/" in name] == [
        "checkpoints/best.txt",
        "checkpoints/step=000001.ckpt",
    ]


def test_a_copy_that_failed_or_was_removed_by_somebody_stops_no_other(
    store, monkeypatch, tmp_path: Path, caplog
) -> None:
    copy = Mirror(tmp_path, ADDRESS)
    copy.begin()
    save(tmp_path, 1, keep=1)
    with monkeypatch.context() as broken:
        broken.setattr(type(store), "put_file", lambda *_, **__: (_ for _ in ()).throw(OSError("no answer")))
        copy.start()
        copy.wait()
    assert "no answer; the next checkpoint tries again" in caplog.text
    save(tmp_path, 2, keep=1)
    copy.finish()
    assert copied(store) == [2]
    store.rm_file("/bucket/run/checkpoints/step=000002.ckpt")
    save(tmp_path, 3, keep=1)
    copy.finish()
    assert copied(store) == [3]
