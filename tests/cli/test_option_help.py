"""`--help` of a command lists its own options with the comments that stand in conf/, and imports nothing heavy."""

from pathlib import Path

import pytest
import yaml

from genai_pl.cli.option_help import help_text
from genai_pl.training.trust import CONF

COMMANDS = {"train": "config"} | {
    name: name for name in ("generate", "evaluate", "export", "serve", "feedback", "distill")
}


def flat(text: str) -> str:
    """The text on one line, as lines are broken to the width of the terminal."""
    return " ".join(text.split())


def options(contents: dict, prefix: str = "") -> list[str]:
    """The dotted names of the values in a file of options."""
    names = []
    for key, value in contents.items():
        if key not in ("defaults", "hydra"):
            names += options(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key}"]
    return names


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_every_option_of_the_command_with_its_comment_and_no_group_of_another(name: str, command) -> None:
    path = CONF / f"{COMMANDS[name]}.yaml"
    contents = yaml.safe_load(path.read_text())
    result = command(name, "--help")
    assert (result.status, result.err) == (0, "")
    text = flat(result.out)
    for option in options(contents):
        assert f" {option}=" in text
    comments = [line.partition(" # ")[2] for line in path.read_text().partition("\nhydra:")[0].splitlines()]
    for comment in filter(None, comments[comments.index(comments[-1]) - len(options(contents)) :]):
        assert flat(comment) in text
    groups = {key for entry in contents["defaults"] if isinstance(entry, dict) for key in entry}
    listed = {
        line.split()[0]
        for line in result.out.partition("Options,")[0].splitlines()
        if line.startswith("  ") and line[2] != " "
    }
    assert listed == {group for group in groups if "/" not in group}
    assert result.out.count(f"python {name}.py") >= 3


def test_help_of_a_group_says_what_its_choices_are_and_which_is_the_default() -> None:
    text = flat(help_text("config", ["--help", "optimizer"]))
    for path in (CONF / "optimizer").glob("*.yaml"):
        assert flat(path.read_text().splitlines()[0][2:]) in text
    assert "optimizer=muon* Muon" in text
    assert "optimizer.momentum=0.95 memory of the mean of gradients" in text


def test_help_of_a_choice_has_the_fields_it_begins_with_too() -> None:
    text = flat(help_text("config", ["peft=dora", "-h"]))
    assert "peft.dora=true" in text
    assert "peft.rank=8 of the change of a weight" in text
    text = flat(help_text("config", ["--help", "model=llama"]))
    assert "model.n_kv_head" in text
    assert "null: n_head (no grouping)" in text


def test_help_of_one_option_is_its_line_and_a_slip_is_told_with_the_nearest(command) -> None:
    assert flat(help_text("config", ["--help", "data.batch_size"])).startswith("data.batch_size=")
    result = command("train", "--help", "optimiser")
    assert (result.status, result.err) == (2, "error: optimiser: no such group or option, did you mean optimizer?\n")
    result = command("generate", "--help", "generation=sampler")
    assert result.err == "error: generation=sampler: no such option; generation is one of beam, greedy, sampling\n"


def test_options_of_ones_own_are_in_the_help(tmp_path: Path) -> None:
    (tmp_path / "optimizer").mkdir()
    (tmp_path / "optimizer" / "lion.yaml").write_text("# Lion\nlr: 1.0e-4 # the peak\n")
    for arguments in (["--config-dir", str(tmp_path)], [f"--config-dir={tmp_path}"]):
        assert "lion" in help_text("config", ["--help", *arguments])
        assert "optimizer.lr=1.0e-4  the peak" in help_text("config", ["--help", *arguments, "optimizer=lion"])
