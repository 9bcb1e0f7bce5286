"""Every file of conf/peft in a run: it starts at the base, trains only itself, goes on exactly, and comes back."""

import csv
from pathlib import Path

import pytest
import torch

from genai_pl.loading import load
from genai_pl.peft import adapters_disabled
from tests.conftest import ROOT, TINY, some

METHODS = sorted(path.stem for path in (ROOT / "conf" / "peft").glob("*.yaml") if path.stem != "none")
FAST = ("lora", "dora", "prefix")
SOME = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in METHODS]
MERGED = {"lora", "dora", "ia3", "bitfit"}
GPT = ("model=gpt", *TINY, "model.n_head=4", "model.max_seq_len=64", "optimizer.lr=1e-2")
IDS = torch.arange(40, 60)[None]


def losses(run: Path) -> list[tuple[str, str]]:
    with (run / "metrics.csv").open() as file:
        return [(row["train/loss"], row["val/loss"]) for row in csv.DictReader(file)]


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(IDS)


@pytest.mark.parametrize("method", SOME)
def test_an_adapter_is_trained_alone_and_comes_back(method: str, command, tmp_path: Path) -> None:
    arguments = ("train", *GPT, f"peft={method}", "callbacks.checkpoint.every_n_steps=2")
    result = command(*arguments, "hydra.run.dir=run")
    assert result.status == 0, result.err
    assert "trainable params: " in result.out
    run = tmp_path / "run"
    assert not (run / "model").exists()
    adapted, of_checkpoint, base = load("run").model, load("run/checkpoints/last.ckpt").model, load("run/base").model
    assert torch.equal(logits(adapted), logits(of_checkpoint))
    assert (logits(adapted) - logits(base)).abs().max() > 1e-6
    with adapters_disabled(adapted):
        assert torch.equal(logits(adapted), logits(base))
    # the checkpoint: adapter, its two moments, and what every run has (tokenizer, random numbers, position)
    adapter_bytes = (run / "adapter/adapter_model.safetensors").stat().st_size
    assert (run / "checkpoints/last.ckpt").stat().st_size <= 3 * adapter_bytes + 60_000
    assert command(*arguments, "hydra.run.dir=half").status == 0
    assert command("train", "resume=half/checkpoints/step=000002.ckpt").status == 0
    assert losses(tmp_path / "half") == losses(run)


@pytest.mark.parametrize("method", SOME)
def test_an_adapter_generates_and_merges_where_it_can(method: str, command, tmp_path: Path) -> None:
    assert command("train", *GPT, f"peft={method}", "hydra.run.dir=run").status == 0
    options = ("prompt=A", "generation.max_new_tokens=4", "generation=greedy")
    text = command("generate", "checkpoint=run", *options)
    assert text.status == 0, text.err
    again = command("generate", "checkpoint=run/base", "adapter=run", *options)
    assert again.out == text.out
    merged = command("export", "checkpoint=run", "format=merged", "out=merged")
    if method in MERGED:
        assert merged.status == 0, merged.err
        torch.testing.assert_close(logits(load("merged").model), logits(load("run").model), rtol=0, atol=1e-5)
    else:
        assert merged.status == 2
        assert f"peft={method} cannot be merged" in merged.err
        assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("method", some(METHODS))
def test_an_adapter_goes_with_the_rest(method: str, command) -> None:
    options = ("precision=bf16", "trainer.accumulate_grad_batches=2", "trainer.recompute_every=1", "optimizer=muon")
    result = command("train", *GPT, f"peft={method}", *options)
    assert result.status == 0, result.err


def test_several_adapters_answer_in_one_batch_or_together(command) -> None:
    for method in ("lora", "ia3"):
        assert command("train", *GPT, f"peft={method}", f"hydra.run.dir={method}", "seed=0").status == 0
    one = [
        command("generate", "checkpoint=lora/base", f"adapter={m}", "prompt=A", "generation=greedy",
                "generation.max_new_tokens=4").out.strip()
        for m in ("lora", "ia3")
    ]  # fmt: skip
    both = command("generate", "checkpoint=lora/base", "adapter=[lora,ia3]", "prompt=A", "generation=greedy",
                   "generation.max_new_tokens=4")  # fmt: skip
    assert both.status == 0, both.err
    for name, text in zip(("lora", "ia3"), one, strict=True):
        assert f"[{name}] {text}" in both.out
    alone = command("generate", "checkpoint=lora/base", "adapter=[lora,ia3]", "adapter_weights=[1,0]", "prompt=A",
                    "generation=greedy", "generation.max_new_tokens=4")  # fmt: skip
    assert alone.out.strip() == one[0]


def test_an_adapter_that_the_checkpoint_brings_is_not_put_on_twice(command, tmp_path: Path) -> None:
    from genai_pl.errors import ConfigError
    from genai_pl.serving.metrics import Metrics
    from genai_pl.serving.service import open_service
    from genai_pl.serving.settings import Settings

    command("train", *GPT, "peft=lora", "trainer.max_steps=1", "output_dir=run")
    commands = (
        ("generate", "checkpoint=run", "adapter=run", "score=true", "prompt=A"),
        ("generate", "checkpoint=run/checkpoints/last.ckpt", "adapter=run", "prompt=A"),
        ("export", "checkpoint=run", "adapter=run/adapter", "format=merged", "out=merged"),
    )
    for arguments in commands:
        result = command(*arguments)
        assert (result.status, result.err.count("\n")) == (2, 1)
        assert f"{arguments[2]}: {arguments[1]} brings it already" in result.err
    with pytest.raises(ConfigError, match="adapter=run: checkpoint=run brings it already"):
        open_service(Settings(checkpoint="run", adapters={"run": "run"}), Metrics())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("peft=lora", "peft.target_modules=[nothing]"), "no module is called nothing; there are: q_proj"),
        (("peft=bitfit", "model.bias=false"), "bias"),
        (("peft.init_from=nowhere",), "peft.init_from=nowhere: no adapter_config.json in this folder"),
    ],
)
def test_a_mistake_is_one_line(arguments: tuple[str, ...], message: str, command) -> None:
    result = command("train", *GPT, *arguments)
    assert result.status in (1, 2)
    assert message in result.err
    assert result.err.count("\n") == 1


def test_tokens_that_a_model_lacked_come_with_its_adapter(command, tmp_path: Path) -> None:
    """The base is written down with more rows, of which the adapter holds the trained ones."""
    assert command("train", *GPT, "tokenizer=byte", "callbacks.export=true", "hydra.run.dir=gpt").status == 0
    arguments = ("objective=fim", "init_from=gpt", "peft=lora", "peft.modules_to_save=[embed,lm_head]")
    result = command("train", *GPT, *arguments, "hydra.run.dir=run")
    assert result.status == 0, result.err
    before, base, adapted = (load(name).model for name in ("gpt", "run/base", "run"))
    n = before.config.vocab_size
    assert adapted.config.vocab_size == base.config.vocab_size == n + 3
    torch.testing.assert_close(logits(base)[..., :n], logits(before))
    with adapters_disabled(adapted):
        assert torch.equal(logits(adapted), logits(base))
    assert (logits(adapted)[..., n:] - logits(base)[..., n:]).abs().max() > 1e-6
    assert torch.equal(logits(load("run/checkpoints/last.ckpt").model), logits(adapted))


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_on_two_processes_is_that_of_one(method: str, command, tmp_path: Path) -> None:
    arguments = ("train", *GPT, f"peft={method}", "data.batch_size=2", "data.val_batch_size=2")
    assert command(*arguments, "trainer.accumulate_grad_batches=2", "hydra.run.dir=one").status == 0
    result = command(*arguments, "trainer=ddp", "trainer.devices=2", "hydra.run.dir=two")
    assert result.status == 0, result.err
    torch.testing.assert_close(logits(load("two").model), logits(load("one").model), rtol=0, atol=1e-5)
