"""Sweeps that are killed go on where they were, and a sweeper that searches is given the metric it optimizes."""

import json
import math
import os
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from genai_pl.errors import UserError
from genai_pl.training.resume import replay
from genai_pl.training.sweeps import read_results, replay_sweep, write_results
from tests.cli.test_commands import start, table, wait_for_step
from tests.conftest import TINY

JOB = (*TINY, "callbacks.export=false", "callbacks.checkpoint.every_n_steps=2", "trainer.limit_val_batches=1")
SWEEP = (*JOB, "optimizer.lr=1e-2,1e-3,1e-4")


@pytest.mark.slow
def test_a_killed_sweep_skips_what_is_done_resumes_what_was_not_and_starts_the_rest(command, tmp_path: Path) -> None:
    longer = ("trainer.max_steps=60", "trainer.val_check_interval=60")
    assert command("train", "-m", *SWEEP, *longer, "hydra.sweep.dir=whole").status == 0
    sweep = tmp_path / "multirun" / "one"
    process = start(sweep.parent, "-m", *SWEEP, *longer, f"hydra.sweep.dir={sweep}")
    wait_for_step(sweep / "1", process, 10)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = {p: p.stat().st_mtime_ns for p in (sweep / "0").rglob("*") if p.suffix in (".csv", ".ckpt")}
    assert not (sweep / "2").exists()
    result = command("train", "-m", "resume=auto")
    assert result.status == 0, result.err
    assert "multirun/one/0 is finished: skipped" in result.out
    assert "resuming    multirun/one/1/checkpoints/" in result.out
    assert before == {p: p.stat().st_mtime_ns for p in before}
    for job in "012":
        assert table(sweep / job) == table(tmp_path / "whole" / job)
        steps = json.loads((sweep / job / "results.json").read_text())
        assert steps["step"] == 60
        assert steps["val/loss"] == float(table(sweep / job)[60]["val/loss"])
    again = command("train", "-m", "resume=auto", "trainer.max_steps=62")
    assert again.status == 0, again.err
    assert "skipped" not in again.out
    assert max(table(sweep / "2")) == 62


def saved(folder: Path, *overrides: str, hydra: tuple[str, ...] = ()) -> None:
    folder.mkdir(parents=True)
    contents = {"hydra": {"overrides": {"task": list(overrides), "hydra": ["hydra.mode=MULTIRUN", *hydra]}}}
    (folder / "multirun.yaml").write_text(yaml.safe_dump(contents))


def test_the_newest_sweep_goes_on_with_its_own_settings_and_new_ones(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert replay_sweep(["-m", "resume=auto", "seed=1,2"]) == ["-m", "seed=1,2"]
    saved(tmp_path / "multirun" / "a", "seed=1,2")
    saved(
        tmp_path / "multirun" / "b", "optimizer.lr=1e-3,1e-2", "trainer.max_steps=5", hydra=("hydra/launcher=joblib",)
    )
    os.utime(tmp_path / "multirun" / "a" / "multirun.yaml", (1, 1))
    assert replay_sweep(["-m", "resume=auto", "trainer.max_steps=9"]) == [
        *("-m", "hydra/launcher=joblib", "optimizer.lr=1e-3,1e-2", "resume=auto", "trainer.max_steps=9"),
        "hydra.sweep.dir='multirun/b'",
    ]
    assert "seed=1,2" in replay_sweep(["-m", "resume=auto", "hydra.sweep.dir=multirun/a"])


@pytest.mark.parametrize("reference", ["mine", "multirun/2026-01-01/mine"])
def test_a_sweep_goes_on_by_its_name_or_path_as_by_auto_and_its_folder(reference: str, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "multirun" / "2026-01-01" / "mine", "seed=1,2")
    saved(tmp_path / "multirun" / "2026-01-02" / "newer", "seed=3,4")
    named = "hydra.sweep.dir='multirun/2026-01-01/mine'"
    assert replay(["-m", f"resume={reference}"]) == replay(["-m", "resume=auto", named])
    assert "seed=1,2" in replay(["-m", f"resume={reference}"])
    with pytest.raises(UserError, match="both name the sweep"):
        replay(["-m", f"resume={reference}", "hydra.sweep.dir=elsewhere"])
    with pytest.raises(UserError) as caught:
        replay([f"resume={reference}"])
    assert str(caught.value) == (
        f"resume={reference}: multirun/2026-01-01/mine is a sweep; it goes on by: "
        "python train.py -m resume=multirun/2026-01-01/mine"
    )


def test_a_name_that_no_sweep_has_is_one_line_before_a_job_starts(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "multirun" / "2026-01-01" / "mine", "seed=1,2")
    with pytest.raises(UserError) as caught:
        replay(["-m", "resume=mein"])
    assert str(caught.value) == (
        "resume=mein: no such sweep, run folder or .ckpt file (the nearest here: multirun/2026-01-01/mine)"
    )


def test_a_stopped_sweep_names_the_command_that_goes_on_with_all_of_it_and_a_finished_one_that_which_compares(
    command, monkeypatch
) -> None:
    from genai_pl.callbacks import Console

    begin = Console.on_train_batch_start

    def interrupted(*args: object) -> None:
        signal.raise_signal(signal.SIGINT)
        begin(*args)

    with monkeypatch.context() as patched:
        patched.setattr(Console, "on_train_batch_start", interrupted)
        stopped = command("train", "-m", *JOB, "seed=1,2", "hydra.sweep.dir=a sweep")
    assert stopped.status == 130, stopped.err
    assert stopped.out.splitlines()[-1] == "next        python train.py -m resume='a sweep'"
    assert "compare.py" not in stopped.out
    result = command("train", "-m", "resume=a sweep")
    assert result.status == 0, result.err
    assert "resuming    a sweep/0/checkpoints/" in result.out
    assert Path("a sweep/1/results.json").exists()
    assert result.out.splitlines()[-1] == "next        python compare.py 'a sweep'"


@pytest.mark.parametrize(
    ("overrides", "typed", "message"),
    [
        (["seed=1,2"], "seed=1,2,3", "was started with seed=1,2, not seed=1,2,3"),
        (["seed=1,2"], "optimizer.lr=1,2", "was started without optimizer.lr"),
        (["+callbacks.extra.x._target_=os.getcwd"], "seed=1", "names code to run"),
    ],
)
def test_what_would_mix_two_sweeps_up_is_one_line(overrides, typed, message, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "multirun" / "a", *overrides)
    with pytest.raises(UserError, match=message) as error:
        replay_sweep(["-m", "resume=auto", typed])
    assert "\n" not in str(error.value)


def test_a_finished_run_is_one_that_took_all_its_steps(tmp_path: Path) -> None:
    assert read_results(tmp_path, 4) is None
    write_results(tmp_path, 4, {"val/loss": 1.5})
    assert read_results(tmp_path, 4) == read_results(tmp_path, -1) == {"step": 4, "val/loss": 1.5}
    assert read_results(tmp_path, 5) is None


class Pick(Sweeper):
    """Runs three jobs, one of which diverges, and keeps what they gave back."""

    found: list[object] = []

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        jobs = [[*arguments, f"optimizer.lr={lr}"] for lr in ("1e-3", "1e-2", "1e30")]
        Pick.found = [job.return_value for job in self.launcher.launch(jobs, initial_job_idx=0)]


@dataclass
class PickConfig:
    """Of the sweeper above."""

    _target_: str = f"{__name__}.Pick"


@pytest.fixture
def _pick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Plugins, "is_in_toplevel_plugins_module", staticmethod(lambda name: True))
    Plugins.instance().register(Pick)
    ConfigStore.instance().store(group="hydra/sweeper", name="pick", node=PickConfig)


@pytest.mark.usefixtures("_pick")
def test_a_sweeper_is_given_the_metric_and_a_diverged_job_is_not_a_number(command, tmp_path: Path) -> None:
    options = (
        "scheduler=constant",
        "scheduler.warmup_steps=0",
        "optimizer=sgd",
        "hydra/sweeper=pick",
        "hydra.sweep.dir=s",
    )
    result = command("train", "-m", *JOB, *options)
    assert result.status == 0, result.err
    first, second, third = Pick.found
    assert [first, second] == [float(table(tmp_path / "s" / job)[4]["val/loss"]) for job in "01"]
    assert math.isnan(third)
    assert "is not finite" in result.err
    wrong = command("train", "-m", *JOB, *options, "optimized_metric=val/lss")
    assert wrong.status == 2
    assert "optimized_metric=val/lss: no such metric; validation measures val/accuracy, val/bpb, val/loss" in wrong.err


@pytest.mark.parametrize("plugin", ["hydra/launcher=joblib", "hydra/sweeper=optuna", "hydra/launcher=submitit_slurm"])
def test_a_plugin_that_is_not_installed_is_one_line(plugin: str, command) -> None:
    result = command("train", "-m", plugin, "seed=1,2")
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert f"{plugin}: not installed; pip install hydra-" in result.err
