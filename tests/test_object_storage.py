"""Object storage without a server: what guards a folder that several processes fill."""

import threading
import time
from pathlib import Path

from genai_pl.object_storage import one_at_a_time


def test_one_at_a_time_fills_a_folder_though_each_removes_the_lock(tmp_path: Path) -> None:
    inside, most = [], []

    def fill() -> None:
        for _ in range(10):
            with one_at_a_time(tmp_path / "models"):
                inside.append(1)
                most.append(len(inside))
                time.sleep(0.001)
                inside.pop()

    threads = [threading.Thread(target=fill) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 80
    assert not list((tmp_path / "models").iterdir())
