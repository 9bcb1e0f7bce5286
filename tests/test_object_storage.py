"""Object storage without a server: what guards a folder that several processes fill."""

import logging
import threading
import time
from pathlib import Path

from genai_pl.object_storage import one_at_a_time, open_storage


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


def test_what_clients_of_storages_say_at_their_start_is_not_printed() -> None:
    open_storage("memory://bucket", "data.path")
    assert not logging.getLogger("botocore.utils").isEnabledFor(logging.INFO)
    assert logging.getLogger("aiobotocore.credentials").isEnabledFor(logging.WARNING)
