"""train.log: what was printed and warned, in that order, in the folder of the run; and nothing of runs that never started."""

import io
import sys
import warnings
from pathlib import Path

import pytest

from genai_pl.training import run_log
from genai_pl.training.run_log import RunLog
from tests.conftest import TINY

LOG = Path("run/train.log")


def recorded(tmp_path: Path, *printed: tuple[str, str]) -> list[str]:
    """The lines of a log after these (stream, text) were written."""
    log = RunLog(io.StringIO())
    for stream, text in printed:
        log.add(hash(stream), text)
    log.keep(tmp_path / "log")
    log.close()
    return (tmp_path / "log").read_text().split("\n")[:-1] if (tmp_path / "log").exists() else []


def test_the_log_of_a_run_is_what_was_printed_and_a_resume_appends_to_it(command) -> None:
    first = command("train", *TINY, "hydra.run.dir=run")
    assert first.status == 0
    assert LOG.read_text() == first.out
    for text in ("data        ", "parameters", "tok/s", "val/loss", "next        "):
        assert text in first.out
    second = command("train", "resume=run", "trainer.max_steps=5")
    assert second.status == 0
    assert LOG.read_text() == first.out + second.out


def test_warnings_and_the_error_that_ends_a_run_are_in_its_log(command, monkeypatch: pytest.MonkeyPatch) -> None:
    from genai_pl.callbacks import Console

    def warn(*_: object) -> None:  # as warnings.showwarning does, which pytest replaces
        sys.stderr.write(warnings.formatwarning("something odd", UserWarning, "file.py", 3, "line()"))

    monkeypatch.setattr(Console, "on_train_start", warn)
    result = command("train", *TINY, "optimizer.lr=1e38", "scheduler.warmup_steps=0", "hydra.run.dir=run")
    assert result.status == 1
    lines = LOG.read_text().splitlines()
    assert "file.py:3: UserWarning: something odd" in lines
    assert lines[-1].startswith("error: the loss is not finite at step 2")
    assert {*lines} == {*result.out.splitlines(), *result.err.splitlines()}


def test_each_job_of_a_sweep_has_the_log_of_its_own_run(command) -> None:
    result = command("train", "-m", *TINY, "seed=1,2", "hydra.sweep.dir=sweep")
    assert result.status == 0, result.err
    logs = [Path(f"sweep/{job}/train.log").read_text() for job in range(2)]
    assert [log.count("precision 32-true (auto") for log in logs] == [1, 1]
    assert ["seed 1" in log for log in logs] == [True, False]
    assert result.out == "".join(logs) + "next        python compare.py sweep\n"  # of all jobs


def test_streams_keep_the_order_of_their_lines(tmp_path: Path) -> None:
    printed = [("out", "a"), ("err", "b\n"), ("out", "c\nd"), ("err", "e"), ("out", "\n"), ("err", "\n")]
    assert recorded(tmp_path, *printed) == ["b", "ac", "d", "e"]


def test_a_bar_is_what_is_left_of_it_and_nothing_obeys_the_log(tmp_path: Path) -> None:
    bar = "".join(f"\r{n}%|###" for n in range(100))
    printed = [("err", bar), ("err", "\r      \r"), ("out", "row\n"), ("err", "\r100%|####\n"), ("err", "\r  \r\n")]
    assert recorded(tmp_path, *printed) == ["row", "100%|####"]
    (tmp_path / "log").unlink()
    odd = "\x1b[31mred\x1b[0m \x1b]0;title\x07x\x00\x07\x9b\u202e\ttab \u2028 naïve 日本\r\n"
    assert recorded(tmp_path, ("out", odd)) == ["red x????\ttab ? naïve 日本"]


def test_secrets_are_masked_also_where_a_line_is_written_in_parts(tmp_path: Path) -> None:
    printed = [("out", "redis://:pass"), ("out", "word@host and hf_abcdefghij"), ("out", "klmnopqrstuv\n")]
    assert recorded(tmp_path, *printed) == ["redis://***@host and ***"]


def test_half_of_a_surrogate_pair_does_not_end_the_log(tmp_path: Path) -> None:
    assert recorded(tmp_path, ("out", "a\ud800b\n")) == ["a\\ud800b"]


def test_only_the_first_process_of_a_run_records(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    before = sys.stdout
    with run_log.recording():
        assert sys.stdout is before
        run_log.keep(tmp_path / "log")
        print("of the second process")
    assert not (tmp_path / "log").exists()


def test_what_ends_a_run_by_a_mistake_of_the_code_leaves_its_trace_in_the_log(tmp_path: Path) -> None:
    def fails() -> None:
        run_log.keep(tmp_path / "log")
        raise ZeroDivisionError("a bug")

    with pytest.raises(ZeroDivisionError), run_log.recording(), run_log.recording():
        fails()
    assert (tmp_path / "log").read_text().splitlines()[-1] == "ZeroDivisionError: a bug"
