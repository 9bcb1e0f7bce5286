"""A dry run plans the run that would be made, from configuration files alone."""

import json
import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from genai_pl.cli.planned_run import devices_per_node
from genai_pl.models import n_parameters
from tests.conftest import TINY, some

SIZE = re.compile(r"^model +([\d,]+) parameters \(([\d,]+) trainable\)", re.M)
STEP = re.compile(r"^step .*$", re.M)
PLAN = ("dry_run=true", "data.path=no_such_file", "plan=cpu")
FSDP = ("trainer=fsdp", "trainer.devices=8")
ZERO = ("strategy=deepspeed", "optimizer=adamw")
PIPELINE = ("strategy=pipeline", "trainer.devices=2", "data.batch_size=8", "strategy.microbatches=8")


@pytest.fixture
def run(command, tmp_path: Path) -> Path:
    assert command("train", *TINY, "trainer.max_steps=1", "output_dir=run").status == 0
    return Path("run")


def memory(out: str) -> dict[str, str]:
    """What the table of a plan says of each part."""
    return dict(re.findall(r"^  (\w+) +([\d.]+ \w+)", out, re.M))


def everything(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.suffix != ".log"}


@pytest.mark.parametrize("reference", ["run", "run/model", "run/checkpoints/last.ckpt"])
def test_init_from_is_planned_at_its_own_size_and_nothing_is_written(reference: str, run: Path, command) -> None:
    from genai_pl import load

    before = everything(Path())
    n = n_parameters(load("run").model)
    result = command("train", f"init_from={reference}", *PLAN)
    assert result.status == 0, result.err
    assert SIZE.search(result.out).groups() == (f"{n:,}", f"{n:,}")
    assert "context 32" in result.out
    assert "data.seq_len 256 -> 32: the model's context" in result.out
    assert everything(Path()) == before


def test_no_weights_are_read(run: Path, command, monkeypatch: pytest.MonkeyPatch) -> None:
    from genai_pl.models.hf.folder import TensorFiles

    def read(self, name):
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr(TensorFiles, "read", read)
    assert command("train", "init_from=run/model", *PLAN).status == 0


def test_the_tokens_that_an_objective_needs_are_counted(command, tmp_path: Path) -> None:
    counts = {
        ("objective=clm",): 258,
        ("objective=mlm", "model=encoder_nano"): 259,  # a mask
        ("objective=fim",): 261,  # prefix, middle and suffix
        ("objective=span_corruption", "model=t5_nano"): 358,  # T5's 100 sentinels
    }
    for options, n in counts.items():
        result = command("train", *PLAN, "tokenizer=byte", *options)
        assert result.status == 0, result.err
        assert f" {n} tokens, context" in result.out


@pytest.mark.slow
def test_the_model_of_a_plan_is_that_of_the_run(command, tmp_path: Path) -> None:
    Path("pairs.jsonl").write_text(
        "".join(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n" for _ in range(20))
    )
    Path("texts.jsonl").write_text(
        "".join(json.dumps({"anchor": f"{n}", "positive": f"{n}"}) + "\n" for n in range(20))
    )
    runs = {
        ("objective=reward", "data.path=pairs.jsonl"),
        ("objective=contrastive", "data.path=texts.jsonl"),
        ("objective=dpo", "data.path=pairs.jsonl", "peft=lora"),
        ("objective=mlm", "model=encoder_nano"),
    }
    for options in runs:
        arguments = ("train", *TINY, "trainer.max_steps=1", "callbacks.export=false", *options)
        trained, estimated = command(*arguments), command(*arguments, "dry_run=true")
        assert trained.status == estimated.status == 0, trained.err + estimated.err
        assert SIZE.search(trained.out).groups() == SIZE.search(estimated.out).groups()
        assert STEP.search(trained.out)[0] == STEP.search(estimated.out)[0]
        texts = 1 if "objective=mlm" in options else 2  # of a row
        assert f"({4 * texts} rows x 32 x 1 batches" in trained.out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("objective=mlm",), "objective=mlm needs a model of shape encoder, not decoder"),
        (("peft=prefix", "peft.n_tokens=32"), "peft.n_tokens=32: 32 virtual tokens leave no text to learn"),
        (
            ("init_from=scores",),
            "init_from=scores: a model that embeds or scores texts, without the language-model head",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused_by_plan_and_run_alike(
    options: tuple[str, ...], message: str, command, tmp_path: Path
) -> None:
    from genai_pl.config.enums import Head
    from genai_pl.data import byte_tokenizer
    from genai_pl.exporting import export_model
    from genai_pl.models import ModelConfig, build_model

    model = build_model(ModelConfig(n_layer=1, n_head=2, n_embd=32, vocab_size=258, max_seq_len=32))
    model.set_head(Head.score)
    export_model(model, byte_tokenizer(), tmp_path / "scores", card={})
    sizes = () if "init_from=scores" in options else TINY
    for more in ((), ("dry_run=true",)):
        result = command("train", *sizes, "output_dir=refused", *options, *more)
        assert (result.status, result.err.count("\n")) == (2, 1), result.err
        assert message in result.err
        assert not Path("refused/checkpoints").exists()


@pytest.mark.slow
def test_layers_that_an_adapter_trains_whole_are_planned(run: Path, command) -> None:
    options = ("init_from=run", "peft=lora", "peft.modules_to_save=[embed,lm_head]", "data.batch_size=4")
    short = ("trainer.max_steps=1", "callbacks.export=false", "callbacks.samples.every_n_steps=null")
    trained, estimated = command("train", *options, *short), command("train", *options, *PLAN)
    assert trained.status == estimated.status == 0, trained.err + estimated.err
    assert SIZE.search(trained.out).groups() == SIZE.search(estimated.out).groups()
    assert estimated.err == ""


def test_a_reference_is_a_copy_of_the_weights_and_none_beside_an_adapter(run: Path, command) -> None:
    for objective in ("dpo", "kto", "grpo"):
        result = command("train", "init_from=run", f"objective={objective}", *PLAN)
        assert memory(result.out)["reference"] == memory(result.out)["weights"]
        adapted = command("train", "init_from=run", f"objective={objective}", "peft=lora", *PLAN)
        assert "reference" not in memory(adapted.out)
    without = command("train", "init_from=run", "objective=dpo", "objective.loss=simpo", *PLAN)
    assert "reference" not in memory(without.out)


def test_a_rollout_a_critic_and_what_is_left_out_are_said(run: Path, command) -> None:
    options = ("objective=ppo", "objective.critic=run", "data.batch_size=32", "objective.minibatch_size=8")
    result = command("train", "init_from=run", *PLAN, *options, "objective.max_new_tokens=16")
    assert result.status == 0, result.err
    assert "32 completions (32 prompts x 1 x 1 devices) of at most 16 tokens, then 16 steps" in result.out
    assert "(8 rows x 32 x 1 batches x 1 devices)" in result.out
    assert "critic" in memory(result.out)
    assert "left out    the time that writing completions and judging them takes" in result.out


def test_pairs_are_two_texts_each_and_a_reference_reads_them_too(run: Path, command) -> None:
    def seconds(*options: str) -> float:
        out = command("train", "init_from=run", "data.batch_size=4", "dry_run=true", "data.path=x", *options).out
        assert "(8 rows x 32 x 1 batches x 1 devices)" in out
        return float(re.search(r"computing +([\d.e-]+)s", out)[1])

    own, measured = seconds("objective=dpo", "objective.loss=simpo"), seconds("objective=dpo")
    assert measured / own == pytest.approx(
        4 / 3, rel=0.01
    )  # one forward pass beside forward and backward, which is two


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("init_from=nowhere",), "init_from=nowhere: no such run folder"),
        (("init_from=owner/name",), "init_from=owner/name: not here, and dry_run=true downloads nothing"),
        (("model=hf", "model.name=run/model"), "not model=hf"),
        (("init_from=run", "model.n_layer=7"), "init_from=run has n_layer=1"),
        (("init_from=run", "peft.init_from=run"), "dry_run=true reads no adapter"),
    ],
)
def test_what_cannot_be_planned_is_one_line(options: tuple[str, ...], message: str, run: Path, command) -> None:
    result = command("train", *PLAN, *options)
    assert (result.status, result.err.count("\n")) in ((1, 1), (2, 1))
    assert message in result.err


REFUSED = (
    (("trainer.devices=0",), "trainer.devices=0: a number of at least 1"),
    ((*FSDP, "strategy.context_parallel_size=0"), "strategy.context_parallel_size=0: at least 1"),
    ((*FSDP, "strategy.replicate_size=3"), "strategy.replicate_size (3) must divide"),
    ((*FSDP, "trainer.optimizer_in_backward=true"), "trainer.optimizer_in_backward=true is for one process"),
    ((*ZERO, "strategy.stage=4"), "strategy.stage=4: ZeRO has stages 1, 2 and 3"),
    ((*ZERO, "strategy.offload_parameters=true"), "strategy.offload_parameters=true needs strategy.stage=3"),
    ((*ZERO, "optimizer=muon"), "optimizer=adam, adamw, sgd"),
    ((*ZERO, "optimizer.moments=int8"), "optimizer=adam, adamw, sgd"),
    ((*ZERO, "strategy.stage=3", "peft=lora", "peft.quantize=nf4"), "strategy=deepspeed divides no codes"),
    ((*ZERO, "objective=grpo"), "an objective that writes while it trains"),
    ((*PIPELINE, "strategy.microbatches=3"), "data.batch_size (8) must be a multiple of strategy.microbatches (3)"),
    ((*PIPELINE, "objective=dpo"), "strategy=pipeline is for clm"),
    ((*PIPELINE, "strategy.schedule=zero_bubble", "trainer.recompute=full"), "trainer.recompute does not go with"),
)


@pytest.mark.parametrize(("options", "message"), some(REFUSED))
def test_what_a_run_refuses_before_it_starts_processes_a_plan_refuses(
    options: tuple[str, ...], message: str, command
) -> None:
    result = command("train", *PLAN, "tokenizer=byte", *options)
    assert (result.status, result.err.count("\n")) in ((1, 1), (2, 1)), result.err
    assert message in result.err


@pytest.mark.parametrize(("devices", "n"), [("auto", 8), (-1, 8), (3, 3), ("2", 2), ("0,1", 2), ([0, 2, 3], 3)])
def test_devices_are_counted_as_lightning_reads_them(devices: object, n: int) -> None:
    config = {"trainer": {"devices": devices}, "plan": {"gpu": "h200", "per_node": 8}}
    assert devices_per_node(OmegaConf.create(config)) == n
    on_cpu = OmegaConf.create(config | {"plan": {"gpu": "cpu", "per_node": 8}})
    assert devices_per_node(on_cpu) == (1 if n == 8 else n)


def test_shards_in_ram_are_no_part_of_a_devices_memory(command) -> None:
    options = ("dry_run=true", "data.path=x", "model=gpt", "tokenizer=byte", "plan=h200", "trainer=fsdp")
    beside, offloaded = (command("train", *options, *more).out for more in ((), ("strategy.cpu_offload=true",)))
    states = [memory(beside)[part].split() for part in ("weights", "gradients", "optimizer")]
    assert not memory(offloaded).keys() & {"weights", "gradients", "optimizer"}
    assert {unit for _, unit in states} == {"MiB"}
    assert float(re.search(r"in RAM +([\d.]+) MiB", offloaded)[1]) == pytest.approx(
        sum(float(n) for n, _ in states), 0.01
    )
