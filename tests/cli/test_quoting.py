"""What is typed on the command line is what a run gets: names of files, texts, lines of prompts."""

from pathlib import Path

import pytest

from tests.conftest import TINY


def test_a_prompt_file_has_one_prompt_a_line_and_lines_end_at_line_breaks_alone(tmp_path: Path) -> None:
    from omegaconf import OmegaConf

    from genai_pl.cli.generate import read_prompts

    prompts = ["one\u2028still", "two\x85still", "three\x0cstill", "four"]
    (tmp_path / "p.txt").write_text("\n".join([*prompts, ""]), encoding="utf-8-sig")
    assert read_prompts(OmegaConf.create({"prompt": None, "prompt_file": str(tmp_path / "p.txt")})) == prompts


NAMES = [
    "a (1).txt",
    "a,b.txt",
    "ä.txt",
    "it's.txt",
    "a#1.txt",
    "a[1].txt",
    "{a}.txt",
    "a b.txt",
    "1e3",
    "true",
    "a=b.txt",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_file_of_any_name_is_found_on_the_command_line(name: str, command, tmp_path: Path) -> None:
    (tmp_path / name).mkdir() if "." not in name else None
    path = tmp_path / name / "t.txt" if "." not in name else tmp_path / name
    path.write_text("short")
    result = command("train", *TINY, f"data.path={name}")
    assert "5 tokens are too few" in result.err, result.err


def test_a_home_folder_is_found(command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "t.txt").write_text("short")
    assert "5 tokens are too few" in command("train", *TINY, "data.path=~/t.txt").err


def test_a_sweep_of_files_that_are_not_there_says_how_a_comma_is_quoted(command) -> None:
    result = command("train", *TINY, "data.path=no,file.txt")
    assert result.err == (
        "error: data.path=no,file.txt: values with a comma between them are a sweep (--multirun); "
        "text goes in quotes within quotes: \"data.path='no,file.txt'\"\n"
    )


@pytest.mark.parametrize(
    ("typed", "expected"), [("[true]", ["true"]), ("[1e3, x]", ["1e3", "x"]), ("['a,b',007]", ["a,b", "007"])]
)
def test_stop_strings_are_as_they_are_typed(typed: str, expected: list[str]) -> None:
    from hydra import compose, initialize_config_dir

    from genai_pl.cli.command import CONF, register
    from genai_pl.cli.quoting import quote_argument

    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("generate", overrides=[quote_argument(f"generation.stop={typed}")])
    assert list(config.generation.stop) == expected
