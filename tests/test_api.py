"""The API functions return what the commands print."""

import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed import DistNetworkError

from genai_pl import generate, load, train
from genai_pl.config.generation import GenerationConfig
from genai_pl.errors import ConfigError, TrainingError
from tests.conftest import TINY


def test_a_run_is_trained_loaded_and_asked(command, tmp_path: Path) -> None:
    run = train(*TINY, "hydra.run.dir=here")
    assert run == tmp_path / "here"
    assert command("train", *TINY, "hydra.run.dir=there").status == 0
    ours, theirs = load(str(run)).model.state_dict(), load("there").model.state_dict()
    assert all((ours[name] == theirs[name]).all() for name in theirs)
    arguments = ("checkpoint=here", "prompt=A", "generation=greedy", "generation.max_new_tokens=6")
    text = command("generate", *arguments).out.strip()
    options = {"temperature": 0.0, "max_new_tokens": 6}
    assert f"A{generate(str(run), 'A', **options)}".strip() == text
    assert generate(load(str(run)), ["A", "B"], **options)[0] == generate(str(run), "A", **options)
    assert GenerationConfig(**options).temperature == 0.0
    assert generate(str(run), ["A", "B"], draft="there", **options) == generate(str(run), ["A", "B"], **options)
    drafted = command("generate", *arguments, "generation.draft=there")
    assert (drafted.out.strip(), drafted.status) == (text, 0)
    assert "proposed tokens accepted" in drafted.err


def test_a_run_goes_on_where_it_stood(command, tmp_path: Path) -> None:
    whole = train(*TINY, "hydra.run.dir=whole")
    part = train(*TINY, "callbacks.checkpoint.every_n_steps=2", "hydra.run.dir=part")
    (part / "checkpoints" / "step=000004.ckpt").unlink()
    assert train(f"resume={part}/checkpoints/step=000002.ckpt") == part
    assert (part / "metrics.csv").read_text().count("\n") == (whole / "metrics.csv").read_text().count("\n")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.n_layr=3", "model.n_layr: no such option, did you mean n_layer?"),
        ("data.path=nowhere.txt", "nowhere.txt"),
    ],
)
def test_a_mistake_is_an_exception_with_the_line_of_the_command(override: str, message: str, command) -> None:
    from genai_pl.errors import UserError

    with pytest.raises(UserError) as error:
        train(*TINY, override, "hydra.run.dir=here")
    assert message in str(error.value)
    assert issubclass(ConfigError, UserError)


@pytest.mark.parametrize("resumed", [False, True])
def test_processes_that_cannot_connect_are_no_fault_of_a_checkpoint(
    resumed: bool, command, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train(*TINY, "callbacks.checkpoint.every_n_steps=2", "hydra.run.dir=here")
    saved = run / "checkpoints" / "step=000002.ckpt"

    def fit(*_: object, **__: object) -> None:
        raise DistNetworkError("The server socket has failed to listen on any local network address. port: 40000")

    monkeypatch.setattr("lightning.Trainer.fit", fit)
    with pytest.raises(TrainingError, match=r"processes of the run cannot connect: .* port: 40000; start the command"):
        train(*([f"resume={saved}"] if resumed else [*TINY, "hydra.run.dir=there"]))
    assert saved.exists()


def test_the_package_alone_imports_nothing_heavy() -> None:
    code = "import sys, genai_pl; sys.exit(any(m in sys.modules for m in ('torch', 'hydra', 'lightning')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
