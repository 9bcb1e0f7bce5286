"""Every option composes and builds; every mistake is one line that names the option and the fix."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from genai_pl.cli.command import CONF, register
from genai_pl.errors import ConfigError
from genai_pl.training.targets import check_arguments
from tests.conftest import TINY, some

OPTIONS = sorted(
    f"{path.parent.name}={path.stem}" for path in CONF.glob("*/*.yaml") if path.parent.name not in ("schema", "hydra")
)


def composed(*overrides: str):
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=["output_dir=out", *overrides])


@pytest.mark.parametrize("option", some(OPTIONS))
def test_every_option_composes_with_the_defaults(option: str) -> None:
    config = composed(option)
    missing = [key for key in OmegaConf.missing_keys(config) if key.split(".")[0] in ("tokenizer", "model", "data")]
    for key in missing:  # what only the user knows
        OmegaConf.update(config, key, "somewhere")
    assert OmegaConf.to_container(config, resolve=True)


MODELS = sorted(path for path in CONF.glob("model/*.yaml") if path.stem != "hf")  # which has no size of its own


@pytest.mark.parametrize("path", some(MODELS), ids=lambda p: p.stem)
def test_every_model_builds_on_the_meta_device(path: Path) -> None:
    import torch

    from genai_pl.models import build_model
    from genai_pl.training.initial_model import model_config

    with torch.device("meta"):
        build_model(model_config(composed(f"model={path.stem}"), 1000))


@pytest.mark.parametrize("path", sorted(CONF.rglob("*.yaml")), ids=lambda p: str(p.relative_to(CONF)))
def test_every_option_is_explained(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# ")
    body = "\n".join(lines).split("\nhydra:")[0].splitlines()
    plain = path.parent.name in (
        "model",
        "generation",
        "logger",
        "experiment",
    )  # their fields are explained in genai_pl/config/model.py
    silent = [
        line for line in body
        if not plain and ":" in line and "#" not in line
        and not line.lstrip().startswith(("-", "_")) and not line.endswith(":")
    ]  # fmt: skip
    assert not silent


def test_an_experiment_beats_the_defaults_and_the_command_line_beats_it() -> None:
    chosen = composed("experiment=smoke")
    assert (chosen.trainer.max_steps, chosen.tokenizer.kind, chosen.model.n_layer) == (20, "byte", 2)
    chosen = composed("experiment=smoke", "trainer.max_steps=7", "tokenizer=bpe", "optimizer=sgd")
    assert (chosen.trainer.max_steps, chosen.tokenizer.kind, chosen.optimizer.lr) == (7, "bpe", 0.1)


def test_the_experiment_of_fine_tuning_takes_conversations_and_a_small_learning_rate() -> None:
    chosen = composed("experiment=sft")
    assert chosen.objective._target_ == "genai_pl.modules.sft.SFTModule"
    assert chosen.data._target_ == "genai_pl.data.chat.ChatDataModule"
    assert (chosen.optimizer._target_, chosen.optimizer.lr) == ("genai_pl.optim.adamw", 2e-5)


def test_a_preset_of_the_trainer_picks_a_strategy_that_can_be_overridden() -> None:
    assert composed().strategy.lightning == "auto"
    assert composed("trainer=ddp").strategy.lightning == "ddp"
    assert composed("trainer=ddp", "strategy=auto").strategy.lightning == "auto"
    assert composed("trainer=ddp", "trainer.devices=3").trainer.devices == 3


MISTAKES = {
    "model=gptt": "did you mean gpt?",
    "model.n_layr=3": "model.n_layr: no such option, did you mean n_layer?",
    "modle.n_layer=3": "did you mean model.n_layer?",
    "model.n_layer=two": "model.n_layer",
    "model.position=sideways": "model.position",
    "optimizer.lr=fast": "optimizer.lr=fast: expected a number",
    "optimizer.lr=-1": "optimizer.lr",
    "trainer.max_steps=many": "trainer.max_steps=many: expected a number",
    "trainer.max_steps=0": "trainer.max_steps=0",
    "model.n_embd=33": "model.n_embd (33) must be divisible by model.n_head (4)",
    "model.vocab_size=100": "model.vocab_size (100) is below the tokenizer's 258 tokens",
    "data.path=nowhere.txt": "data.path=nowhere.txt: no such file",
    "data.val_path=nowhere.txt": "data.val_path=nowhere.txt: no such file",
    "data.val_fraction=2": "data.val_fraction",
    "tokenizer.name=x tokenizer=pretrained": "x: no tokenizer could be read",
    "init_from=nowhere": "nowhere: no such run folder",
    "resume=nowhere": "resume=nowhere: no such run folder or .ckpt file",
    "model.attention=sdpa model.softcap=30": "model.attention",
    "trainer.accelerator=gpu": "trainer",
    "broken[": "not understood",
    "trainer.limit_val_batches=0.00001": "trainer.limit_val_batches=1e-05: less than one batch; take at least ",
    "+trainer.limit_train_batches=0.00001": "trainer.limit_train_batches=1e-05: less than one batch",
    "+trainer.check_val_every_n_epoch=3": "trainer.check_val_every_n_epoch=3: has no effect: trainer.val_check_interval",
    "+trainer.min_steps=50": "trainer.min_steps=50: has no effect: trainer.max_steps",
    "+trainer.precision=16": "trainer.precision=16: has no effect: set precision=",
    "trainer=cpu precision=fp16": "precision=fp16 needs a GPU",
    "hydra=null": "hydra=null: has fields of its own",
    "hydra.run.dir=/dev/null": "hydra.run.dir=/dev/null: File exists",
    "output_dir=/dev/null/x": "output_dir=/dev/null/x: Not a directory",
}


@pytest.mark.parametrize("mistake", some(MISTAKES))
def test_a_mistake_is_one_line(mistake: str, command) -> None:
    result = command("train", *TINY, *mistake.split())
    assert result.status in (1, 2)
    assert result.err.count("\n") == 1
    assert result.err.startswith("error: ")
    assert MISTAKES[mistake] in result.err


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        ("empty.txt", b"", "empty"),
        ("latin.txt", b"line one\nna\xefve" * 100, "not UTF-8 at byte 11 (line 2)"),
        ("short.txt", b"too short", "too few for one row of 33"),
        ("rows.jsonl", b'{"body": "x", "title": "y"}\n', "no column 'text'; found: body, title"),
        ("broken.jsonl", b'{"text": "x"\nnonsense', "cannot be read as json"),
        ("odd.xyz", b"something", "unknown kind of file"),
    ],
)
def test_bad_data_is_one_line(name: str, contents: bytes, message: str, command, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(contents)
    result = command("train", *TINY, f"data.path={name}")
    assert result.status in (1, 2)
    assert result.err.count("\n") == 1
    assert message in result.err


def test_a_dry_run_prints_costs_and_trains_nothing(command, tmp_path: Path) -> None:
    result = command("train", "dry_run=true", "model=gpt", "tokenizer.vocab_size=50257")
    assert result.status == 0
    assert "124,439,808 parameters" in result.out  # Radford et al. 2019, as published weights count
    for part in ("weights", "gradients", "optimizer", "activations", "FLOPs"):
        assert part in result.out
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize(
    "option", ["+model.n_lanes=4", "+objective.span=3", "+callbacks.sample=1", "+data.shuffled=true", "+sead=1"]
)
def test_an_added_option_that_nothing_reads_is_one_line(option: str, command) -> None:
    result = command("train", *TINY, option)
    name = option.removeprefix("+").partition("=")[0]
    assert result.status in (1, 2)
    assert result.err.startswith(f"error: {name}: no such option"), result.err
    assert result.err.count("\n") == 1


@pytest.mark.parametrize("value", [0.5, ["x"], "many"])
def test_a_field_of_a_collator_is_checked_by_its_hint(value: object) -> None:
    node = {"_target_": "genai_pl.modules.span_corruption.SpanCorruptionModule", "mixture": value}
    with pytest.raises(ConfigError, match=r"objective\.mixture=.*: expected a list, each fields or null"):
        check_arguments(node, "objective")


@pytest.mark.parametrize("objective", sorted(path.stem for path in (CONF / "objective").glob("*.yaml")))
def test_every_objective_takes_the_fields_of_its_file(objective: str) -> None:
    node = OmegaConf.to_container(composed(f"objective={objective}").objective, throw_on_missing=False)
    check_arguments({name: value for name, value in node.items() if value != "???"}, "objective")
