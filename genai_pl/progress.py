"""Progress bars: what is done of a long work, its speed and the time left; on a terminal alone.

Reading, tokenizing, evaluating and exporting draw theirs here. A work that is done within MOMENT shows nothing, and
neither does a pipe or a file.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tqdm import tqdm

MOMENT = 1.0  # seconds before a bar is drawn
INTERVAL = 0.2  # seconds between two looks at the size of what is written
BYTES = "B"


def progress_bar(total: float | None, what: str, *, unit: str = " rows", leave: bool = True) -> "tqdm":
    """A bar on stderr, to be used as a context; `update(n)` counts what is done.

    total: None where no end is known. what: is done. unit: of the count; BYTES are shown as kB, MB, GB.
    leave: whether the finished bar stays on the screen.
    """
    from tqdm import tqdm

    options = {"unit": unit, "unit_scale": unit == BYTES, "leave": leave}
    return tqdm(total=total, desc=what, disable=None, delay=MOMENT, dynamic_ncols=True, **options)


@contextmanager
def written_bytes_bar(path: Path, total: int, what: str) -> Iterator[None]:
    """Context in which a bar follows the size of a file or folder that grows to about `total` bytes."""
    with progress_bar(total, what, unit=BYTES) as bar:
        if bar.disable:
            yield
            return
        done = Event()

        def follow() -> None:
            """Look at the size until the work is done."""
            while not done.wait(INTERVAL):
                bar.update(min(_size(path), total) - bar.n)

        thread = Thread(target=follow, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
        bar.update(total - bar.n)


def _size(path: Path) -> int:
    """Bytes of a file, or of all files of a folder; 0 for those that are gone."""
    sizes = 0
    for file in [path, *path.rglob("*")]:
        try:
            sizes += file.stat().st_size if file.is_file() else 0
        except FileNotFoundError:  # renamed between two looks
            continue
    return sizes
