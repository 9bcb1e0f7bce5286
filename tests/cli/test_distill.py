"""distill.py: a teacher's file that is written by one command and read by runs, whatever happens to the writer."""

import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from genai_pl.atomic_io import claimed
from genai_pl.loading import load
from genai_pl.modules.teacher_cache import Contents, TeacherCache
from genai_pl.serving.app import create_app
from tests.conftest import TINY
from tests.serving.servers import make_service, running, write_model
from tests.training.test_alignment import table

WRITE = ("distill", "teacher=teacher", "data.path=text.txt", "data.seq_len=32", "data.batch_size=4", "top_k=9")
OWN = [option for option in TINY if not option.startswith(("model.", "tokenizer"))]
TRAIN = ("train", "objective=distill", "init_from=student", "data.path=text.txt", "data.seq_len=32", *OWN)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_model(folder / "teacher", template=False, n_layer=2)
    write_model(folder / "student", template=False, init_std=0.05)
    return folder


@pytest.fixture
def place(models: Path, tmp_path: Path) -> Path:
    for name in ("teacher", "student"):
        (tmp_path / name).symlink_to(models / name)
    (tmp_path / "text.txt").write_text("".join(f"{i} times {i} is {i * i}. " for i in range(60)))
    return tmp_path


def killed_after(n: int, run) -> None:
    """Let a copy of this process call a function, which SIGKILL ends at its n-th write."""
    child = os.fork()
    if child == 0:
        original, calls = TeacherCache.write, []

        def write(self, *arguments: object) -> None:
            calls.append(original(self, *arguments))
            if len(calls) == n:
                os.kill(os.getpid(), signal.SIGKILL)

        TeacherCache.write = write
        run()
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


def test_a_killed_writer_goes_on_and_the_file_is_that_of_a_run(place: Path, command) -> None:
    result = command(*WRITE, "out=whole")
    assert result.status == 0, result.err
    killed_after(3, lambda: command(*WRITE, "out=taught"))
    done = int((TeacherCache(place / "taught").done == 1).sum())
    again = command(*WRITE, "out=taught")
    assert 0 < done < TeacherCache(place / "whole").contents.rows
    assert f"teacher     {done} of " in again.out
    for name in ("ids", "logprobs", "done"):
        assert (place / "taught" / name).read_bytes() == (place / "whole" / name).read_bytes()
    # a run that has the teacher write its file learns the same
    assert command(*TRAIN, "objective.teacher=taught", "hydra.run.dir=file").status == 0
    options = ("objective.teacher=teacher", "objective.top_k=9", "objective.teacher_cache=cache", "hydra.run.dir=own")
    assert command(*TRAIN, *options).status == 0
    losses = [[row["train/loss"] for row in table(place / run)] for run in ("file", "own")]
    assert losses[0] == losses[1]


class Stumbling:
    """An application in front of another one, which answers every third request itself, or none of them.

    n_left: completions after which it only fails; None: it does not.
    """

    def __init__(self, app: Callable) -> None:
        self.app, self.n, self.n_left = app, 0, None

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        self.n += 1
        if self.n_left is not None:
            self.n_left -= 1
        if self.n % 3 and (self.n_left is None or self.n_left >= 0):
            await self.app(scope, receive, send)
            return
        status = (500, 429, 200)[self.n // 3 % 3]
        await send({"type": "http.response.start", "status": status, "headers": [(b"retry-after", b"0")]})
        await send({"type": "http.response.body", "body": b'{"choices": [{"logpro'})


def test_a_server_that_stumbles_and_dies_leaves_the_file_of_one_that_does_not(
    place: Path, command, monkeypatch
) -> None:
    monkeypatch.setattr("genai_pl.endpoints.time.sleep", lambda seconds: None)
    service = make_service(place / "teacher")
    app = Stumbling(create_app(service, service.settings, service.metrics, (), ()))
    with running(app) as url:
        options = ("data.path=text.txt", "data.seq_len=32", "data.batch_size=4", "top_k=9", "init_from=teacher")
        options = ("distill", *options, f"teacher={url}/v1", "objective.server.workers=1")
        app.n_left = 10
        died = command(*options, "objective.server.retries=4")
        assert (died.status, died.err.count("\n")) == (2, 1), died.err
        assert died.err.startswith(f"error: teacher={url}/v1: no answer (")
        done = int(TeacherCache(place / "taught").done.sum())
        assert 0 < done < TeacherCache(place / "taught").contents.rows
        app.n_left = None
        again = command(*options, "objective.server.retries=4")
        assert again.status == 0, again.err
        assert f"teacher     {done} of " in again.out
    assert command(*WRITE, "out=beside").status == 0
    served, beside = (TeacherCache(place / name) for name in ("taught", "beside"))
    assert (served.done == 1).all()
    np.testing.assert_allclose(
        np.exp(served.logprobs[:].astype(float)), np.exp(beside.logprobs[:].astype(float)), atol=2e-3
    )


def test_the_second_of_two_writers_is_one_line(place: Path, command) -> None:
    assert command(*WRITE).status == 0
    expected = [(place / "taught" / name).read_bytes() for name in ("ids", "logprobs", "done")]
    TeacherCache(place / "taught", writable=True).done[1] = 0  # of a batch that was marked by half
    ready, end = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        with claimed(place / "taught"):
            os.write(ready[1], b"r")
            os.read(end[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    result = command(*WRITE)
    os.write(end[1], b"e")
    os.waitpid(child, 0)
    assert (result.status, result.err.count("\n")) == (1, 1), result.err
    assert f"taught: process {child} on " in result.err
    assert command(*WRITE).status == 0
    assert [(place / "taught" / name).read_bytes() for name in ("ids", "logprobs", "done")] == expected


def test_a_full_disk_is_one_line_and_the_command_goes_on_later(place: Path, command, monkeypatch) -> None:
    assert command(*WRITE, "out=whole").status == 0
    create, limits = TeacherCache.create, resource.getrlimit(resource.RLIMIT_FSIZE)

    def on_a_small_disk(folder: Path, contents: Contents, **options: int) -> None:
        create(folder, contents, **options)
        half = (folder / "logprobs").stat().st_size // 2
        resource.setrlimit(resource.RLIMIT_FSIZE, (half, limits[1]))  # bytes behind it are refused, not those before it

    monkeypatch.setattr(TeacherCache, "create", staticmethod(on_a_small_disk))
    try:
        result = command(*WRITE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert result.status == 1
    assert "taught" in result.err.splitlines()[-1]
    assert "Traceback" not in result.err
    monkeypatch.setattr(TeacherCache, "create", create)
    done = TeacherCache(place / "taught").done.sum()
    assert 0 < done < len(TeacherCache(place / "whole").done)
    assert command(*WRITE).status == 0
    for name in ("ids", "logprobs", "done"):
        assert (place / "taught" / name).read_bytes() == (place / "whole" / name).read_bytes()


def test_the_file_has_the_likeliest_tokens_and_the_mass_of_all_others(place: Path, command) -> None:
    assert command(*WRITE).status == 0
    cache = TeacherCache(place / "taught")
    model = load("teacher").model
    text = (place / "text.txt").read_bytes()
    row = torch.tensor([list(text[:32])])  # a byte is its id
    with torch.no_grad():
        exact = model.logits(model.features(row))[0].double().softmax(-1)
    values, ids = cache.read(torch.tensor([0]), 32, device=torch.device("cpu"))
    expected = exact.topk(9)
    assert (ids[0] == expected.indices).all()
    np.testing.assert_allclose(values[0, :, :9].exp(), expected.values, rtol=4e-3)
    np.testing.assert_allclose(values[0, :, 9].exp(), 1 - expected.values.sum(1), rtol=4e-3)


MISTAKES = (
    ("distill", ("top_k=0",), "top_k=0 must be at least 1"),
    ("distill", ("temperature=0",), "temperature=0.0 must be above 0"),
    ("distill", ("temperature=inf",), "temperature=inf"),
    ("distill", ("optimizer.lr=1e-4",), "optimizer.lr=1e-4: has no effect: nothing is trained"),
    ("distill", ("trainer=ddp",), "trainer=ddp: has no effect: nothing is trained"),
    ("distill", ("objective.server.workers=2",), "objective.server.workers=2: has no effect: teacher is no address"),
    ("distill", ("out=text.txt",), "out=text.txt: there is something else"),
    ("distill", ("objective.alpha=0.1",), "objective.alpha=0.1: has no effect"),
    ("distill", ("top_k=8",), "out=taught: holds another top_k (teacher)"),
    ("distill", ("data.seq_len=16",), "out=taught: holds other rows (teacher)"),
    ("distill", ("teacher=student",), "out=taught: holds another teacher (teacher)"),
    ("train", ("objective.teacher=taught", "data.seq_len=16"), "rows of 32 tokens, the data give"),
    ("train", ("objective.teacher=taught", "data.path=other.txt"), "holds other rows than the data give"),
    ("train", ("objective.teacher=taught", "objective.temperature=2"), "was written at temperature 1.0"),
    ("train", ("objective.teacher=taught", "objective.top_k=8"), "holds 9 tokens of a position"),
    ("train", ("objective.teacher=taught", "objective.student_fraction=0.5"), "what the student writes is not on"),
    ("train", ("objective.teacher=cut",), "cut: 1 rows are missing"),
)


def test_a_mistake_is_one_line(place: Path, command) -> None:
    assert command(*WRITE).status == 0
    (place / "other.txt").write_text((place / "text.txt").read_text().replace("1", "2"))
    shutil.copytree(place / "taught", place / "cut")
    TeacherCache(place / "cut", writable=True).done[0] = 0
    for name, options, message in MISTAKES:
        result = command(*(WRITE if name == "distill" else TRAIN), *options)
        assert result.status in (1, 2), options
        assert result.err.startswith("error: ")
        assert message in result.err
        assert result.err.count("\n") == 1
