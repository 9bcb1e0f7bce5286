"""Sandbox: programs end as they are told to, in time, and have nothing of ours."""

import os
import time
from itertools import combinations
from pathlib import Path

import pytest

from genai_pl.evaluation.generative import sandbox
from genai_pl.evaluation.generative.sandbox import Limits, Outcome, check_sandbox, run_program, run_programs
from genai_pl.evaluation.metrics import pass_at_k

LIMITS = Limits(seconds=0.4, memory_mib=256)
ENDS = [
    ("assert 1 + 1 == 2", "passed", ""),
    (
        "import dataclasses, heapq, re, math\n@dataclasses.dataclass\nclass A:\n    x: int\nassert A(1).x == 1",
        "passed",
        "",
    ),
    ("if __name__ == '__main__':\n    raise ValueError", "passed", ""),
    ("assert 1 + 1 == 3, 'no'", "failed", "AssertionError: no"),
    ("def f(: pass", "error", "SyntaxError"),
    ("undefined", "error", "NameError"),
    ("import sys\nsys.exit(0)", "error", "SystemExit"),
    ("import os\nos._exit(0)", "error", "ended before its tests were through"),
    ("import os\nos.abort()", "error", "ended by signal 6"),
    ("while True: pass", "timed_out", ""),
    ("import time\ntime.sleep(99)", "timed_out", ""),
    ("while True: print('x' * 10000)", "timed_out", ""),
    ("while True:\n    try:\n        while True: pass\n    except BaseException: pass", "timed_out", ""),
    ("x = [0] * 10**10", "memory", "MemoryError"),
    ("input()", "error", "EOFError"),
    ("open('file', 'w').write('x')", "error", "PermissionError"),
    ("open('/etc/passwd').read()", "error", "PermissionError"),
    ("import os\nos.fork()", "error", "PermissionError"),
    ("import subprocess\nsubprocess.run(['true'])", "error", "PermissionError"),
    ("import socket\nsocket.create_connection(('127.0.0.1', 9))", "error", "PermissionError"),
    ("import os\nos.kill(os.getppid(), 15)", "error", "PermissionError"),
    ("import ctypes\nctypes.CDLL(None)", "error", "PermissionError"),
]


@pytest.mark.parametrize(("program", "reason", "detail"), ENDS, ids=range(len(ENDS)))
def test_a_program_ends_for_the_reason_that_it_has(program: str, reason: str, detail: str) -> None:
    start = time.monotonic()
    outcome = run_program(program, LIMITS)
    assert outcome.reason == reason
    assert outcome.detail.startswith(detail)
    assert time.monotonic() - start < 60  # it never hangs


def test_a_program_has_an_empty_folder_and_environment_and_leaves_nothing(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MY_API_KEY", "secret")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    program = (
        "import os\nassert os.listdir('.') == []\nassert not any('KEY' in name for name in os.environ)\n"
        f"assert os.getcwd() != {str(Path.cwd())!r}\nassert 'genai_pl' not in __import__('sys').modules"
    )
    assert run_program(program, LIMITS) == Outcome("passed", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "fork") or os.uname().sysname != "Linux", reason="limits of Linux")
def test_on_linux_the_system_itself_holds_a_program_and_not_python_alone() -> None:
    held = check_sandbox(LIMITS)
    assert {name for name, holds in held.items() if holds} >= {"files", "memory", "cpu", "processes", "root"}
    # threads are processes to the system, and no event of Python's refuses them
    outcome = run_program("import threading\nthreading.Thread(target=print).start()", LIMITS)
    assert outcome.reason == "error"
    assert "thread" in outcome.detail


def test_a_report_without_end_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MOST_BYTES", 1000)
    loop = "for n in range(3, 9):\n        try: os.write(n, b'x' * 100)\n        except OSError: pass"
    program = f"import os\nwhile True:\n    {loop}"
    assert run_program(program, Limits(20.0, 256)).reason == "error"


def test_programs_are_judged_in_their_order_and_a_sandbox_that_does_not_start_is_one_line(monkeypatch) -> None:
    done: list[int] = []
    found = run_programs([f"assert {n} % 3" for n in range(6)], LIMITS, on_done=done.append)
    assert [outcome.reason for outcome in found] == ["failed", "passed", "passed"] * 2
    assert sum(done) == 6
    monkeypatch.setattr(sandbox, "CHILD", Path(__file__).with_name("negatives.json"))  # no program at all
    with pytest.raises(sandbox.ConfigError, match="execute_code=true: the sandbox does not start"):
        run_program("pass", LIMITS)


@pytest.mark.parametrize(("n", "c"), [(5, 0), (5, 1), (5, 3), (5, 5), (1, 1)])
def test_pass_at_k_is_the_share_of_draws_of_k_samples_with_a_right_one(n: int, c: int) -> None:
    right = [sample < c for sample in range(n)]
    for k in range(1, n + 1):
        draws = [any(draw) for draw in combinations(right, k)]
        assert pass_at_k(n, c, k) == pytest.approx(sum(draws) / len(draws))
