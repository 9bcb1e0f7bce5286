"""References: only names of hub form are looked up at the hub, and a mistyped one gets the nearest local name."""

import os
import shutil
import time
from pathlib import Path

import pytest

from genai_pl.errors import CheckpointError
from genai_pl.references import folder_of, is_hub_id, resolve
from tests.conftest import TINY

GOLDEN = Path(__file__).parent / "checkpoints" / "golden"


@pytest.fixture(autouse=True)
def hub_requests(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The names requested from the hub, which has none of them, in a folder of runs and models."""
    import huggingface_hub

    names: list[str] = []

    def download(name: str, **_: object) -> str:
        names.append(name)
        raise OSError(f"{name} is not there\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    for run in ("runs/my_run", "runs/other", "outputs/2026-11-29/10-34-46"):
        (tmp_path / run / ".hydra").mkdir(parents=True)
        (tmp_path / run / "model").mkdir()
        (tmp_path / run / "model" / "config.json").write_text("{}")
    for folder in ("models/smollm2", "HuggingFaceTB/SmolLM2-135M"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "config.json").write_text("{}")
    return names


SLIPS = {
    "runs/myrun": "runs/my_run",
    "runs/my-run": "runs/my_run",
    "./runs/myrun": "runs/my_run",
    "run/my_run": "runs/my_run",
    "outputs/2026-11-29": "outputs/2026-11-29/10-34-46",
    "outputs/2026-11-28": "outputs/2026-11-29/10-34-46",
    "outputs/2026-11-29/10-34-64": "outputs/2026-11-29/10-34-46",
    "output/2026-11-29/10-34-46": "outputs/2026-11-29/10-34-46",
    "multirun/2026-11-29/10-34-46": "outputs/2026-11-29/10-34-46",
    "models/smolm2": "models/smollm2",
    "smollm2": "models/smollm2",
    "runs/my_run/checkpoint/last.ckpt": "runs/my_run",
}


@pytest.mark.parametrize("slip", SLIPS)
def test_a_slip_in_a_path_is_told_with_the_nearest_model_and_the_hub_is_not_asked(
    slip: str, hub_requests: list[str]
) -> None:
    with pytest.raises(CheckpointError) as caught:
        resolve(slip)
    message = str(caught.value)
    assert message.startswith(f"checkpoint={slip}: ")
    assert message.rstrip(")").endswith(SLIPS[slip])
    assert "\n" not in message
    assert hub_requests == []


def test_where_nothing_is_near_nothing_is_suggested(hub_requests: list[str]) -> None:
    with pytest.raises(CheckpointError) as caught:
        resolve("outputs/qqq/www/eee", option="init_from")
    assert str(caught.value) == "init_from=outputs/qqq/www/eee: no such run folder, .ckpt file or Hugging Face folder"
    assert hub_requests == []


@pytest.mark.parametrize("name", ["openai/gpt2", "HuggingFaceTB/SmolLM2-360M", "Qwen/Qwen2.5-0.5B", "a/b.c"])
def test_the_hub_is_asked_for_its_names_even_if_the_account_is_a_folder_here(
    name: str, hub_requests: list[str]
) -> None:
    with pytest.raises(
        CheckpointError, match=f"checkpoint={name}: not here.*, and not from the hub .{name} is not there"
    ):
        resolve(name)
    assert hub_requests == [name]


def test_a_name_of_the_hub_that_is_here_too_is_what_is_here(hub_requests: list[str]) -> None:
    assert resolve("HuggingFaceTB/SmolLM2-135M") == Path("HuggingFaceTB/SmolLM2-135M")
    assert folder_of("HuggingFaceTB/SmolLM2-135M") == Path("HuggingFaceTB/SmolLM2-135M")
    assert hub_requests == []


def test_the_home_folder_may_be_written_as_people_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/models/smollm2") == tmp_path / "models" / "smollm2"


@pytest.mark.parametrize("name", ["", "a", "/a", "a/", "a/b/c", "../b", "./b", "~/b", "outputs/b", "a/step=1.ckpt"])
def test_what_is_no_name_of_the_hub(name: str) -> None:
    assert not is_hub_id(name)


@pytest.mark.parametrize("command_name", ["generate", "evaluate", "export", "train"])
def test_commands_tell_a_slip_by_the_option_it_was_made_in(command_name: str, command, hub_requests: list[str]) -> None:
    option = "init_from" if command_name == "train" else "checkpoint"
    more = {"generate": ["prompt=x"], "evaluate": [], "export": ["out=out"], "train": TINY}[command_name]
    result = command(command_name, f"{option}=runs/myrun", *more)
    assert result.status == 1
    assert result.err == (
        f"error: {option}=runs/myrun: no such run folder, .ckpt file or Hugging Face folder (the nearest here: runs/my_run)\n"
    )
    assert hub_requests == []


def test_a_folder_of_the_hub_is_found_where_it_was_put(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    there = tmp_path / "snapshot" / "config.json"
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, file: str(there))
    assert folder_of("someone/something") == there.parent


def test_a_run_is_its_export_or_its_last_checkpoint_by_their_steps_whatever_files_say_of_times(tmp_path: Path) -> None:
    run, checkpoint = tmp_path / "runs" / "my_run", GOLDEN / "file" / "checkpoints" / "step=000002.ckpt"
    last = run / "checkpoints" / "last.ckpt"
    last.parent.mkdir()
    shutil.copy(checkpoint, last)
    results = run / "results.json"
    results.write_text('{"step": 2}')  # the export is of the same step, and older by an hour
    os.utime(last, (time.time() + 3600, time.time() + 3600))
    assert resolve(str(run)) == run / "model"
    results.write_text('{"step": 1}')  # the run has gone on since, and was copied in another order
    os.utime(last, (time.time() - 3600, time.time() - 3600))
    assert resolve(str(run)) == last
