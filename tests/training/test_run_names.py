"""Runs have names and tags: in folders, cards, tables, and wherever a run is asked for."""

import json
import os
from pathlib import Path

import pytest

from genai_pl.errors import CheckpointError
from genai_pl.references import named_run, newest_run, resolve, resolve_adapter
from tests.conftest import TINY

SHORT = (*TINY, "trainer.max_steps=2", "trainer.limit_val_batches=1")


def folder(parent: str) -> list[str]:
    """The runs of the one day in outputs/ or multirun/."""
    (day,) = Path(parent).iterdir()
    return sorted(path.name for path in day.iterdir())


def test_a_name_is_the_folder_and_finds_the_run_and_tags_filter_the_table(command) -> None:
    result = command("train", *SHORT, "run_name=mine", "tags=[short,low lr]")
    assert result.status == 0, result.err
    assert command("train", *SHORT, "run_name=mine", "seed=1", "tags=[short]").status == 0
    assert folder("outputs") == ["mine", "mine-2"]
    run = next(Path("outputs").iterdir()) / "mine"
    card = (run / "model" / "README.md").read_text()
    assert "## Name\n\nmine\n" in card
    assert "## Tags\n\nshort, low lr\n" in card
    # told where it goes on, by its name
    result = command("train", "resume=mine", "trainer.max_steps=3")
    assert result.status == 0, result.err
    assert f"resuming    {run}/checkpoints/step=000002.ckpt" in result.out
    assert json.loads((run / "results.json").read_text())["step"] == 3
    options = ("prompt=a", "generation.max_new_tokens=2")
    assert (
        command("generate", "checkpoint=mine", *options).out == command("generate", f"checkpoint={run}", *options).out
    )
    # the table
    whole = command("compare", "outputs", "--no-picture").out
    assert "tags" in whole.splitlines()[0]
    assert "run_name" not in whole
    assert len(whole.splitlines()) == 3
    filtered = command("compare", "outputs", "--no-picture", "--tag", "low lr").out.splitlines()
    assert len(filtered) == 2
    assert filtered[1].split("  ")[0].endswith("/mine")
    result = command("compare", "outputs", "--no-picture", "--tag", "long")
    assert result.err == "error: outputs: no run has the tags long; there are: low lr, short\n"
    # a slip
    result = command("train", "resume=mein")
    assert result.err.startswith("error: resume=mein: no such run folder or .ckpt file (the nearest here: outputs/")
    assert command("generate", "checkpoint=mein", "prompt=a").err.rstrip(")\n").endswith(("/mine", "/mine-2"))


@pytest.mark.parametrize("name", ["a/b", "..", ".x", "-m", "a b", "x" * 101, "a:b", "''"])
def test_what_is_no_name_is_one_line_and_makes_no_folder(name: str, command) -> None:
    result = command("train", *SHORT, f"run_name={name}")
    assert result.status == 2
    assert result.err.startswith(f"error: run_name={name.strip(chr(39))}: a name is up to 100 letters")
    assert result.err.count("\n") == 1
    assert os.listdir() == []


def test_a_number_is_a_name_and_one_tag_is_a_list(command) -> None:
    result = command("train", *SHORT, "tags=short")
    assert result.err == "error: tags: a list is needed: tags=[short]\n"
    assert command("train", *SHORT, "run_name=auto").err.startswith(
        "error: run_name=auto: resume=auto and checkpoint=auto"
    )
    assert command("train", *SHORT, "run_name=007").status == 0
    assert folder("outputs") == ["007"]


def test_a_sweep_is_named_and_output_dir_is_the_folder_whatever_the_name(command) -> None:
    assert command("train", "-m", *SHORT, "run_name=mine", "seed=1,2").status == 0
    assert folder("multirun") == ["mine"]
    assert command("train", *SHORT, "run_name=other", "output_dir=here").status == 0
    assert not Path("outputs").exists()
    assert "here (other)" in command("compare", ".", "--no-picture").out


def test_a_sweep_is_no_model_and_the_line_names_its_jobs(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    jobs = [run_of(f"multirun/2026-01-01/mine/{n}") for n in (0, 1, 10)]
    (jobs[0].parent / "multirun.yaml").touch()
    for reference in ("mine", "multirun/2026-01-01/mine"):
        for option, find in (("checkpoint", resolve), ("adapter", resolve_adapter)):
            with pytest.raises(CheckpointError) as caught:
                find(reference)
            assert str(caught.value) == (
                f"{option}=multirun/2026-01-01/mine: a sweep; give one of its jobs: {', '.join(map(str, jobs))} "
                "(python compare.py multirun/2026-01-01/mine ranks them)"
            )
    assert resolve("multirun/2026-01-01/mine/10") == jobs[2] / "checkpoints" / "last.ckpt"


def run_of(path: str, step: int = 0, saved: float = 0.0) -> Path:
    """A run folder with a checkpoint that says when it was saved."""
    from genai_pl.checkpoints.file import MARK, write_checkpoint

    contents = {"state_dict": {}, "global_step": step, "epoch": 0, MARK: {"saved": saved}}
    (Path(path) / "checkpoints").mkdir(parents=True)
    write_checkpoint(contents, Path(path) / "checkpoints" / "last.ckpt")
    return Path(path)


def test_the_newest_run_is_the_one_whose_checkpoints_say_so_for_every_command(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    new, old = run_of("runs/new", 5, saved=2e9 - 1e9), run_of("outputs/2026-01-01/old", 9, saved=9e8)
    job = run_of("multirun/2026-01-01/s/0", 5, saved=1.1e9)
    (job.parent / "multirun.yaml").touch()
    for path in (old / "checkpoints").iterdir():  # as `cp -r` leaves it
        os.utime(path, (1.2e9, 1.2e9))
    assert newest_run(Path(), resumable=True) == new
    assert newest_run(Path()) == job  # a job of a sweep is a model too
    assert resolve("auto") == job / "checkpoints" / "last.ckpt"


def test_a_name_that_two_runs_have_is_refused_with_their_paths(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_of("outputs/2026-01-01/mine")
    assert named_run("mine", "resume") == Path("outputs/2026-01-01/mine")
    assert named_run("other", "resume") is None
    run_of("outputs/2026-01-02/mine")
    with pytest.raises(CheckpointError) as caught:
        resolve("mine")
    assert str(caught.value) == (
        "checkpoint=mine: 2 runs are called so; give the path of one: outputs/2026-01-01/mine, outputs/2026-01-02/mine"
    )
