"""The optimizer that a command gets which names none: by whose weights it trains."""

from pathlib import Path

import pytest
import yaml

from genai_pl.training.default_optimizer import with_default_optimizer
from tests.conftest import TINY

FOREIGN = "init_from=Qwen/Qwen3-0.6B"


@pytest.mark.parametrize(
    "words",
    [
        ["objective=sft", FOREIGN],
        ["--config-dir", "conf", "objective=dpo", FOREIGN],
        ["model=hf", "model.name=x"],
        [FOREIGN, "optimizer.lr=1e-4", "peft=none"],
        ["-m", "init_from=a/b,c/d"],
    ],
    ids=" ".join,
)
def test_weights_of_others_are_fine_tuned(words: list[str]) -> None:
    added = with_default_optimizer(words)
    assert sorted(added) == sorted([*words, "optimizer=finetune"])
    positional = [n for n, word in enumerate(added) if "=" in word]
    assert positional == list(range(positional[0], len(added)))


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["objective=sft"],
        ["init_from=null"],
        ["init_from=auto"],
        ["init_from=mine/best"],
        [FOREIGN, "optimizer=muon"],
        [FOREIGN, "optimizer@optimizer=muon"],
        [FOREIGN, "experiment=sft"],
        [FOREIGN, "peft=lora"],
        [FOREIGN, "objective=classify"],
    ],
    ids=" ".join,
)
def test_nothing_is_added_where_something_chooses_or_the_weights_are_ones_own(words: list[str]) -> None:
    assert with_default_optimizer(words) == words


def test_an_objective_of_ones_own_chooses_its_optimizer(tmp_path: Path) -> None:
    (tmp_path / "objective").mkdir()
    (tmp_path / "objective" / "mine.yaml").write_text("defaults:\n  - override /optimizer@_global_.optimizer: sgd\n")
    words = ["--config-dir", str(tmp_path), "objective=mine", FOREIGN]
    assert with_default_optimizer(words) == words


def test_the_summary_says_so_and_a_run_of_ones_own_keeps_its_optimizer(command, tmp_path: Path) -> None:
    Path("text.txt").write_text("One and two are three. " * 99)
    run = (*TINY, "data.path=text.txt", "precision=fp32", "logger=csv", "trainer.max_steps=1")
    first = command("train", *run, "hydra.run.dir=base")
    assert "optimizer  " not in first.out
    own = command("train", *run, "init_from=base/model", "hydra.run.dir=own")
    assert own.status == 0, own.err
    assert "optimizer  " not in own.out
    # the same folder as somebody else's
    Path("base/model").rename("theirs")
    theirs = command("train", *run, "init_from=theirs", "hydra.run.dir=tuned", "optimizer.lr=1e-4")
    assert (
        "optimizer   finetune, AdamW at lr 0.0001: the default for trained weights (optimizer=, optimizer.lr=)\n"
        in theirs.out
    )
    assert "optimizer=finetune" in yaml.safe_load(Path("tuned/.hydra/overrides.yaml").read_text())
    resumed = command("train", "resume=tuned", "trainer.max_steps=2")
    assert resumed.status == 0, resumed.err
    assert "changed     optimizer" not in resumed.out
