"""docs/extending.md works as printed: its files are written out, and its commands run with few steps."""

import json
import os
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from genai_pl.models.hf.families import FAMILIES
from genai_pl.peft.io.folder import FORMATS, METHODS
from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"^`([\w/]+\.(?:py|yaml))`:\n\n```\w+\n(.*?)^```$", PAGE, re.M | re.S))
SHORT = {
    "train": (
        *("trainer.max_steps=3", "trainer.limit_val_batches=1", "callbacks.samples.every_n_steps=null"),
        *("data.batch_size=2", "trainer.val_check_interval=3"),
    ),
    "generate": ("generation.max_new_tokens=4",),
}
SMALL = ("model.n_layer=1", "model.n_embd=32", "model.max_seq_len=32")
SLOW = {"A model", "A PEFT method", "A reward"}


def sections() -> dict[str, list[str]]:
    """The commands under each heading."""
    parts = re.split(r"^## (.*)$", PAGE, flags=re.M)[1:]
    by_heading = {
        heading: re.findall(r"^((?:GENAI_PL_IMPORT=\S+ )?python .*)$", text, re.M)
        for heading, text in zip(parts[::2], parts[1::2], strict=True)
    }
    return {heading: commands for heading, commands in by_heading.items() if commands}


def shortened(name: str, arguments: list[str]) -> list[str]:
    """The command with small models and few steps."""
    chosen = {argument.partition("=")[0] for argument in arguments}
    further = list(SHORT.get(name, ()))
    if name == "train":
        further += () if "init_from" in chosen or "model=hf" in arguments else SMALL
        further += () if {"tokenizer", "init_from"} & chosen or "model=hf" in arguments else ["tokenizer=byte"]
    return [*arguments, *further]


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the files of the page; registrations in genai_pl are undone afterwards."""
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "mylab" / "__init__.py").touch()
    known, methods, formats, path = list(FAMILIES), dict(METHODS), dict(FORMATS), list(sys.path)
    monkeypatch.chdir(tmp_path)
    sys.path.append(str(tmp_path))
    yield tmp_path
    FAMILIES[:], sys.path[:] = known, path
    for table, before in ((METHODS, methods), (FORMATS, formats)):
        table.clear()
        table.update(before)
    for name in [name for name in sys.modules if name.split(".")[0] == "mylab"]:
        del sys.modules[name]


@pytest.mark.parametrize("heading", [pytest.param(h, marks=pytest.mark.slow if h in SLOW else ()) for h in sections()])
def test_what_a_section_shows_works(heading: str, workplace: Path, command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    for line in sections()[heading]:
        words = shlex.split(line)
        if words[0].startswith("GENAI_PL_IMPORT="):
            monkeypatch.setenv(*words.pop(0).split("=", 1))
        if words[1] == "-m":
            monkeypatch.setattr(sys, "argv", [words[2], *words[3:]])
            runpy.run_module(words[2], run_name="__main__")
        else:
            name = words[1].removesuffix(".py")
            result = command(name, *shortened(name, words[2:]))
            assert result.status == 0, f"{line}: {result.err}"
        monkeypatch.delenv("GENAI_PL_IMPORT", raising=False)


def test_every_kind_of_extension_is_shown() -> None:
    assert {name.split("/")[1] for name in FILES if name.startswith("conf/")} >= {
        *("model", "objective", "peft", "data", "callbacks", "optimizer", "scheduler", "experiment"),
    }
    assert len(sections()) == 9


def test_a_mistake_in_an_option_of_ones_own_is_one_line(workplace: Path, command) -> None:
    options_of_page = ("--config-dir", "conf", "objective=imitate", "objective.teacher=nowhere", "tokenizer=byte")
    result = command("train", *options_of_page, "objective.temprature=1")
    assert result.err == "error: objective.temprature: no such option, did you mean temperature?\n"
    assert result.status == 2
    result = command("train", *options_of_page, "objective.weight=much")
    assert result.err == "error: objective.weight=much: expected a number, like 0.5\n"


def test_every_name_of_the_table_of_parts_stands_in_the_file_that_it_gives() -> None:
    rows = re.findall(r"^\| [a-z ]+ \| `\w+`.*$", PAGE.partition("| part | name in")[2].partition("\n\n")[0], re.M)
    pairs = [pair for row in rows for pair in re.findall(r"`(\w+)` (?:in|of) `([\w/]+\.py)`", row)]
    assert ("build_activation", "models/layers.py") in pairs
    assert len(pairs) >= 4
    for name, file in pairs:
        assert re.search(rf"\b{name}\b", (ROOT / "genai_pl" / file).read_text()), (name, file)


def test_a_model_or_adapter_whose_module_was_not_imported_is_told_how_it_is(
    workplace: Path, command, monkeypatch: pytest.MonkeyPatch
) -> None:
    runpy.run_module("mylab.parallel", run_name="__main__")
    for name in [name for name in sys.modules if name.split(".")[0] == "mylab"]:
        del sys.modules[name]
    config = json.loads(Path("parallel/config.json").read_text()) | {"model_type": "mylab_unknown"}
    Path("parallel/config.json").write_text(json.dumps(config))
    advice = "; if a module of your own brings it, name that: GENAI_PL_IMPORT=MODULE\n"
    result = command("generate", "checkpoint=parallel", "prompt=a")
    assert result.status == 1
    assert result.err.endswith(advice)
    monkeypatch.setenv("GENAI_PL_IMPORT", "mylab.scale")
    options_of_page = ("--config-dir", "conf", "peft=scale", "tokenizer=byte", "hydra.run.dir=run")
    assert command("train", *options_of_page, *SHORT["train"], *SMALL).status == 0
    monkeypatch.delenv("GENAI_PL_IMPORT")
    METHODS.pop("scale"), FORMATS.pop("SCALE")
    for checkpoint in ("run", "run/checkpoints/last.ckpt"):
        result = command("generate", f"checkpoint={checkpoint}", "prompt=a")
        assert result.status == 1
        assert result.err.endswith(advice)


def test_a_module_that_cannot_be_imported_is_one_line(command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GENAI_PL_IMPORT", "nobodys.module")
    result = command("generate", "prompt=x")
    assert result.status == 2
    assert result.err == "error: GENAI_PL_IMPORT=nobodys.module: cannot be imported (No module named 'nobodys')\n"


def test_a_run_with_options_of_ones_own_is_resumed(workplace: Path, command) -> None:
    options_of_page = (
        "--config-dir",
        "conf",
        "optimizer=lion",
        "scheduler=triangle",
        "tokenizer=byte",
        "hydra.run.dir=run",
    )
    assert command("train", *options_of_page, *SHORT["train"], *SMALL).status == 0
    result = command("train", "--config-dir", "conf", "resume=run", "trainer.max_steps=5")
    assert result.status == 0, result.err
    assert "step=000005.ckpt" in os.listdir("run/checkpoints")


def test_options_of_ones_own_are_found_from_python(workplace: Path) -> None:
    from genai_pl import train
    from genai_pl.errors import UserError

    options_of_page = (f"hydra.searchpath=['file://{workplace}/conf']", "optimizer=lion", "tokenizer=byte")
    assert (train(*options_of_page, *SHORT["train"], *SMALL) / "model" / "config.json").exists()
    with pytest.raises(UserError, match="expected a number"):
        train(*options_of_page, "optimizer.lr=fast")


def test_a_family_of_ones_own_reads_its_configuration(workplace: Path) -> None:
    from transformers import Starcoder2Config

    from genai_pl.models.hf.config import read_config

    runpy.run_module("mylab.starcoder2", run_name="mylab.starcoder2")
    Starcoder2Config(hidden_size=96, num_attention_heads=6, sliding_window=16).save_pretrained("starcoder2")
    config, _ = read_config(workplace / "starcoder2" / "config.json")
    assert (config.n_embd, config.n_head, config.n_kv_head, config.window) == (96, 6, 2, 16)
