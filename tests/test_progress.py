"""Progress bars: on a terminal alone, after a moment, in bytes of files whose rows are read."""

import io
import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from torch import nn

from genai_pl import progress
from genai_pl.data import records, sources
from genai_pl.exporting import n_bytes

ROWS = [{"text": f"row {n} ü " + "x" * (n % 70)} for n in range(3000)]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def write(path: Path) -> Path:
    lines = [json.dumps(row) for row in ROWS]
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    elif path.suffix == ".csv":
        path.write_text("text\n" + "".join(row["text"] + "\n" for row in ROWS))
    elif path.suffix == ".txt":
        path.write_text("\n".join(row["text"] for row in ROWS))
    else:
        shapes = {
            "list": f"[{', '.join(lines)}]",
            "values": json.dumps(ROWS[0], indent=1) + "\n" + "\n".join(lines[1:]),
        }
        path.write_text(shapes.get(path.stem, "\n".join(lines)))
    return path


def terminal(monkeypatch: pytest.MonkeyPatch, moment: float = 0) -> Terminal:
    """stderr as a terminal from here on; set within the test, as pytest sets stderr between a fixture and the test."""
    monkeypatch.setattr(progress, "MOMENT", moment)
    monkeypatch.setattr(sys, "stderr", Terminal())
    return sys.stderr


@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.jsonl", "list.json", "values.json", "a.parquet"])
@pytest.mark.parametrize("by_line", [False, True])
def test_bytes_that_are_reported_are_the_size_of_the_file(tmp_path: Path, name: str, by_line: bool) -> None:
    path, reported = write(tmp_path / name), []
    rows = [row for _, row in records.read_records([path], by_line=by_line, on_bytes=reported.append)]
    text = "".join(row["text"] for row in rows)
    assert sum(reported) == pytest.approx(path.stat().st_size)
    assert text.replace("\n", "") == "".join(row["text"] for row in ROWS)


def test_reading_a_file_draws_a_bar_in_bytes_with_the_time_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = terminal(monkeypatch)
    source = sources.find_source(str(write(tmp_path / "a.jsonl")))
    rows = sources.read_records(source)
    for _ in range(10):
        next(rows)
    assert "reading:" in screen.getvalue()
    assert "<" in screen.getvalue()  # elapsed<left
    assert len(list(rows)) == len(ROWS) - 10
    assert "reading: 100%" in screen.getvalue()


def test_what_is_done_at_once_or_on_a_pipe_shows_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with progress.progress_bar(3, "reading") as bar:
        assert bar.disable
        bar.update(3)
    with progress.written_bytes_bar(tmp_path / "model", 10, "writing"):
        (tmp_path / "model").write_bytes(b"0123456789")
    assert capsys.readouterr() == ("", "")


def test_a_short_work_leaves_no_line_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = terminal(monkeypatch, moment=10)
    with progress.progress_bar(3, "reading") as bar:
        assert not bar.disable
        bar.update(3)
    assert screen.getvalue() == ""


def test_a_bar_follows_the_size_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = terminal(monkeypatch)
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "a").write_bytes(b"01234")
    (tmp_path / "b").write_bytes(b"01")
    assert progress._size(tmp_path) == 7
    with pytest.raises(ValueError, match="full"), progress.written_bytes_bar(tmp_path, 10, "writing"):
        raise ValueError("full")
    assert "100%" not in screen.getvalue()
    with progress.written_bytes_bar(tmp_path, 10, "writing"):
        pass
    assert "writing: 100%" in screen.getvalue()


def test_shared_weights_are_written_once() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    assert n_bytes(model) == 24 * 4
    model[1].weight = model[0].weight
    assert n_bytes(model) == 15 * 4
