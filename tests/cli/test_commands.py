"""The commands as a user runs them: train, resume, generate, and the folder that transformers loads."""

import csv
import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from tests.conftest import TINY
from tests.preloaded import Command

SAME = ("train/loss", "train/grad_norm", "train/lr", "train/tokens_seen", "val/loss", "val/bpb")


def table(run: Path) -> dict[int, dict[str, str]]:
    with (run / "metrics.csv").open() as file:
        return {int(row["step"]): {k: row.get(k, "") for k in SAME} for row in csv.DictReader(file)}


@pytest.fixture
def trained(command, tmp_path: Path) -> Path:
    result = command("train", *TINY, "hydra.run.dir=run")
    assert result.status == 0, result.err
    return tmp_path / "run"


def test_a_run_leaves_what_the_documentation_says(trained: Path) -> None:
    for name in (
        ".hydra/config.yaml", "train.log", "metrics.csv", "tensorboard", "checkpoints/last.ckpt",
        "checkpoints/step=000004.ckpt", "model/config.json", "model/model.safetensors", "model/tokenizer.json",
        "model/tokenizer_config.json", "model/generation_config.json", "model/README.md",
    ):  # fmt: skip
        assert (trained / name).exists(), name
    with (trained / "metrics.csv").open() as file:
        columns = next(csv.reader(file))
    for name in ("loss", "lr", "grad_norm", "tokens_per_sec", "mfu", "data_wait", "tokens_seen", "memory_gib"):
        assert f"train/{name}" in columns
    assert {"val/loss", "val/perplexity", "val/bpb"} <= set(columns)
    assert not list(trained.rglob("*.tmp*"))


def test_a_run_says_where_everything_lies_and_what_to_type_next(command) -> None:
    result = command("train", *TINY, "hydra.run.dir=run")
    for text in (
        "parameters",
        "attention   sdpa: ",
        "tok/s",
        "val/loss",
        "run/model",
        "python generate.py checkpoint=run",
    ):
        assert text in result.out
    assert result.err == ""


@pytest.mark.parametrize("model", ["model=gpt_nano", "model=gpt", "model=llama"])
def test_transformers_loads_the_exported_folder_with_our_logits(model: str, command, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from genai_pl.loading import load

    sizes = (
        ("model.n_head=4", "model.n_kv_head=2", "model.intermediate_size=64")
        if model == "model=llama"
        else ("model.n_head=4",)
    )
    assert (
        command("train", model, *TINY, *sizes, "tokenizer=bpe", "tokenizer.vocab_size=300", "hydra.run.dir=run").status
        == 0
    )
    folder = tmp_path / "run" / "model"
    theirs, ours = AutoModelForCausalLM.from_pretrained(folder), load("run")
    ids = torch.tensor([AutoTokenizer.from_pretrained(folder).encode("Two households, both alike")[:20]])
    assert ids[0].tolist() == ours.tokenizer.encode("Two households, both alike")[:20]
    with torch.no_grad():
        torch.testing.assert_close(ours.model(ids), theirs(ids).logits, atol=1e-4, rtol=0)
    of_checkpoint = load("run/checkpoints/last.ckpt")
    assert torch.equal(of_checkpoint.model(ids), ours.model(ids))


def test_generate_writes_the_prompt_and_a_continuation(trained: Path, command) -> None:
    arguments = ("generate", "checkpoint=run", "prompt=ROMEO:", "generation.max_new_tokens=8")
    first, again = command(*arguments), command(*arguments)
    assert first.status == 0
    assert first.err == ""
    assert first.out.startswith("ROMEO:")
    assert first.out == again.out
    assert command(*arguments, "seed=1").out != first.out
    assert command(*arguments, "stream=false").out == first.out
    (trained.parent / "prompts.txt").write_text("one\ntwo words\n")
    many = command(
        "generate", "checkpoint=run", "prompt_file=prompts.txt", "num_samples=2", "generation.max_new_tokens=4"
    )
    assert many.out.count("one") >= 2
    assert many.out.count("-" * 40) == 4


@pytest.mark.parametrize(
    "prompt",
    [
        "To be, or not to be: (that)",
        "it's a \\ 'test'\\",
        pytest.param("x=1; y={2}", marks=pytest.mark.slow),
        "${oc.env:HOME} a",
        pytest.param("two\nlines\t.", marks=pytest.mark.slow),
        pytest.param("[1, 2", marks=pytest.mark.slow),
        pytest.param("# %", marks=pytest.mark.slow),
        "''",
    ],
)
def test_a_prompt_may_be_any_text(prompt: str, trained: Path, command) -> None:
    result = command("generate", "checkpoint=run", f"prompt={prompt}", "generation.max_new_tokens=1")
    assert result.status == 0, result.err
    assert result.out.startswith(prompt if prompt != "''" else "")


def test_a_checkpoint_file_with_its_step_in_the_name_needs_no_quotes(trained: Path, command) -> None:
    path = "run/checkpoints/step=000004.ckpt"
    assert command("generate", f"checkpoint={path}", "prompt=x", "generation.max_new_tokens=1").status == 0
    result = command("train", f"resume={path}", "trainer.max_steps=6")
    assert result.status == 0, result.err
    assert list(table(trained)) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    "mistake",
    [
        "checkpoint=nowhere",
        "checkpoint=.",
        "generation.top_p=2",
        "prompt_file=none.txt",
        "device=tpu9",
        "device=meta",
        "device=cpu:3",
    ],
)
def test_a_mistake_of_generate_is_one_line(mistake: str, command) -> None:
    result = command("generate", "prompt=x", "checkpoint=auto", mistake)
    assert result.status in (1, 2)
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1


@pytest.mark.parametrize("option", ["generation.stop=['']", "generation.bad_words=[a,'']"])
def test_an_empty_text_neither_ends_nor_is_kept_from_an_answer(option: str, trained: Path, command) -> None:
    result = command("generate", "prompt=x", "checkpoint=run", option)
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert result.err.startswith(f"error: {option.partition('=')[0]}=[")


def test_export_names_the_option_that_was_typed(trained: Path, command) -> None:
    result = command("export", "checkpoint=run", "format=peft", "out=alone")
    assert result.err.startswith("error: checkpoint=run: no adapter_config.json in run/model: ")
    assert command("export", "checkpoint=run", "out=''").err == "error: out='': name the folder to write\n"


def test_a_sweep_leaves_runs_that_differ(command, tmp_path: Path) -> None:
    assert command("train", "-m", *TINY, "optimizer.lr=1e-2,1e-4", "hydra.sweep.dir=sweep").status == 0
    first, second = (table(tmp_path / "sweep" / str(i)) for i in range(2))
    assert first[4]["train/loss"] != second[4]["train/loss"]


def test_training_starts_from_a_model_and_its_tokenizer(trained: Path, command) -> None:
    result = command("train", *TINY, "init_from=run", "hydra.run.dir=second")
    assert result.status == 0, result.err
    before, after = table(trained), table(trained.parent / "second")
    assert float(after[1]["train/loss"]) < float(before[1]["train/loss"])


LONG = (
    *TINY,
    "trainer.max_steps=24",
    "trainer.accumulate_grad_batches=2",
    "trainer.val_check_interval=10",
    "callbacks.checkpoint.every_n_steps=5",
    "model.dropout=0.1",
)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory):
    runs: dict[tuple[str, ...], dict] = {}

    def get(*options: str) -> dict:
        if options not in runs:
            run = tmp_path_factory.mktemp("runs") / "whole"
            process = start(run, *LONG, *options, f"hydra.run.dir={run}")
            out, _ = process.communicate()
            assert process.returncode == 0, out
            runs[options] = table(run)
        return runs[options]

    return get


def start(run: Path, *arguments: str) -> Command:
    return Command(arguments, run.parent, os.environ, n_others=0)


def wait_for_step(run: Path, process: Command, step: int) -> None:
    while process.poll() is None:
        if (run / "metrics.csv").exists() and max(table(run), default=0) >= step:
            return
        time.sleep(0.005)
    raise AssertionError(f"ended too early: {process.communicate()[0]}")


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [(), ("data.workers=2", "data.streaming=true", "data.block_rows=9")], ids=["table", "stream"]
)
def test_a_killed_run_goes_on_to_the_same_losses(options: tuple[str, ...], uninterrupted, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(run, *LONG, *options, f"hydra.run.dir={run}")
    wait_for_step(run, process, 13)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    out, _ = start(run, f"resume={run}").communicate()
    assert "resuming    run/checkpoints/" in out
    assert table(run) == uninterrupted(*options)


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_exports_and_the_run_can_go_on(signum: int, status: int, uninterrupted, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(run, *LONG, f"hydra.run.dir={run}")
    wait_for_step(run, process, 8)
    process.send_signal(signum)
    out, _ = process.communicate()
    assert process.returncode == status, out
    assert (run / "model" / "config.json").exists()
    assert "python train.py resume=run" in out
    start(run, f"resume={run}").communicate()
    assert table(run) == uninterrupted()


def test_a_truncated_checkpoint_is_refused_and_auto_takes_the_one_before(command, tmp_path: Path) -> None:
    assert command("train", *TINY, "callbacks.checkpoint.every_n_steps=2", "hydra.run.dir=outputs/run").status == 0
    folder = tmp_path / "outputs" / "run" / "checkpoints"
    newest = folder / "step=000004.ckpt"
    (folder / "last.ckpt").unlink()
    newest.write_bytes(newest.read_bytes()[:-1000])
    refused = command("train", "resume=outputs/run")
    assert refused.status == 1
    assert refused.err.count("\n") == 1
    assert "step=000004.ckpt: refused" in refused.err
    assert "step=000002.ckpt" in refused.err
    result = command("train", "resume=auto")
    assert result.status == 0
    assert "step=000004.ckpt: refused" in result.err
    assert "resuming    outputs/run" in result.out
    assert "step=000002.ckpt" in result.out


class Evil:
    def __reduce__(self):
        return os.system, ("touch owned",)


def test_a_checkpoint_that_names_code_runs_nothing(trained: Path, command) -> None:
    contents = torch.load(trained / "checkpoints" / "last.ckpt", weights_only=True)
    contents["genai_pl"]["model"]["_target_"] = "os.system"
    torch.save(contents, trained / "target.ckpt")
    torch.save({"state_dict": {}, "genai_pl": Evil()}, trained / "pickle.ckpt")
    (trained / "foreign.ckpt").write_text("not a checkpoint")
    torch.save({"state_dict": {}}, trained / "other.ckpt")
    for name in ("target", "pickle", "foreign", "other"):
        for arguments in (
            ("generate", f"checkpoint=run/{name}.ckpt", "prompt=x"),
            ("train", *TINY, f"resume=run/{name}.ckpt"),
        ):
            result = command(*arguments)
            assert result.status == 1
            assert result.err.startswith("error: ")
            assert result.err.count("\n") == 1
            assert "refused" in result.err
    assert not list(trained.parent.rglob("owned"))


def test_a_run_folder_that_names_code_is_not_replayed(trained: Path, command) -> None:
    (trained / ".hydra" / "overrides.yaml").write_text(json.dumps(["+callbacks.extra.x._target_=os.getcwd"]))
    result = command("train", "resume=run")
    assert result.status == 1
    assert "names code to run" in result.err


def test_auto_without_a_run_starts_a_new_one(command) -> None:
    result = command("train", *TINY, "resume=auto", "hydra.run.dir=fresh")
    assert result.status == 0
    assert "no run to continue" in result.out


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(command, tmp_path: Path) -> None:
    assert command("train", *TINY, "hydra.run.dir=one").status == 0
    two = start(
        tmp_path / "two", *TINY, "trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu", "data.batch_size=2",
        "hydra.run.dir=two",
    )  # fmt: skip
    out, _ = two.communicate()
    assert two.returncode == 0, out
    for step, row in table(tmp_path / "one").items():
        for name, value in row.items():
            two_process_value = table(tmp_path / "two")[step][name]
            assert two_process_value == value or float(two_process_value) == pytest.approx(float(value), rel=1e-5), (
                step,
                name,
            )
