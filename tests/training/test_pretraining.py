"""Every pretraining objective as a command: it trains, exports what transformers loads, and goes on exactly."""

import csv
import json
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT, TINY, some

SMALL = (*TINY, "model.n_head=4", "data.workers=0")
OBJECTIVES = {
    "mlm": ("bert_nano", "AutoModelForMaskedLM", "BertForMaskedLM"),
    "span_corruption": ("t5_nano", "AutoModelForSeq2SeqLM", "T5ForConditionalGeneration"),
    "permutation": ("xlnet_nano", "AutoModelForCausalLM", "XLNetLMHeadModel"),
    "prefix_lm": ("gpt_nano", "AutoModelForCausalLM", "Qwen3ForCausalLM"),
    "fim": ("gpt_nano", "AutoModelForCausalLM", "Qwen3ForCausalLM"),
}


def arguments(objective: str) -> tuple[str, ...]:
    return (f"objective={objective}", f"model={OBJECTIVES[objective][0]}", *SMALL)


def losses(run: Path) -> list[tuple[str, str]]:
    with (run / "metrics.csv").open() as file:
        return [(row["train/loss"], row["val/loss"]) for row in csv.DictReader(file)]


def test_every_objective_of_text_is_tried_here() -> None:
    options = {path.stem for path in (ROOT / "conf" / "objective").glob("*.yaml")}
    assert options == {*OBJECTIVES, "clm", "seq2seq", "contrastive", "sft", "reward", "dpo", "kto", "grpo", "ppo"} | {
        "classify",
        "rerank",
        "token_classify",
        "process_reward",
        "distill",
        *("cispo", "dapo", "dr_grpo", "gspo", "reinforce", "rloo"),
    }


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_an_objective_trains_and_exports_what_transformers_loads(objective: str, command, tmp_path: Path) -> None:
    import transformers

    from genai_pl.loading import load

    result = command("train", *arguments(objective), "hydra.run.dir=run")
    assert result.status == 0, result.err
    assert "val/accuracy" in result.out
    _, auto, name = OBJECTIVES[objective]
    theirs = getattr(transformers, auto).from_pretrained(tmp_path / "run" / "model")
    ours = load("run").model
    assert type(theirs).__name__ == name
    ids = torch.arange(10, 30)[None]
    decoder_inputs = {"decoder_input_ids": ids} if objective == "span_corruption" else {}
    with torch.no_grad():
        torch.testing.assert_close(ours(ids, **decoder_inputs), theirs(ids, **decoder_inputs).logits, rtol=0, atol=1e-4)
        of_checkpoint = load("run/checkpoints/last.ckpt").model
        assert torch.equal(of_checkpoint(ids, **decoder_inputs), ours(ids, **decoder_inputs))


@pytest.mark.parametrize("objective", some(["span_corruption", "mlm"]))
def test_noise_is_the_same_whatever_the_workers_and_after_a_resume(objective: str, command, tmp_path: Path) -> None:
    whole = (*arguments(objective), "trainer.max_steps=6", "trainer.val_check_interval=3")
    assert command("train", *whole, "hydra.run.dir=whole").status == 0
    assert command("train", *whole, "data.workers=2", "hydra.run.dir=workers").status == 0
    assert losses(tmp_path / "workers") == losses(tmp_path / "whole")
    half = ("callbacks.checkpoint.every_n_steps=3", "hydra.run.dir=half")
    assert command("train", *whole, *half).status == 0
    assert command("train", "resume=half/checkpoints/step=000003.ckpt").status == 0
    assert losses(tmp_path / "half") == losses(tmp_path / "whole")


def test_an_encoder_decoder_writes(command) -> None:
    assert command("train", *arguments("span_corruption"), "hydra.run.dir=run").status == 0
    one = command("generate", "checkpoint=run", "prompt=I <extra_id_0> you", "generation.max_new_tokens=5")
    assert one.status == 0, one.err
    two = command("generate", "checkpoint=run", "prompt=O", "num_samples=2", "generation.max_new_tokens=5")
    assert two.status == 0, two.err


def test_an_encoder_says_that_it_does_not_write(command) -> None:
    assert command("train", *arguments("mlm"), "hydra.run.dir=run").status == 0
    result = command("generate", "checkpoint=run", "prompt=O")
    assert result.status != 0
    assert result.err == "error: prompt: no <|mask|> in it for this encoder to fill in; or set embed=true\n"


def write_pairs(path: Path, n: int = 24) -> None:
    rows = [{"anchor": f"what is {i}", "positive": f"it is {i}", "negative": f"it is {i + 1}"} for i in range(n)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


PAIRS = ("objective=contrastive", "data=pairs", "data.path=pairs.jsonl", *SMALL)


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("bert_nano", ()),
        ("bert_nano", ("data.negative=negative", "objective.matryoshka_dims=[8,32]", "objective.learn_temperature=true")),
        ("bert_nano", ("data.positive=null", "model.dropout=0.1", "objective.pooling=cls")),
        ("gpt_nano", ("objective.pooling=last",)),
    ],
)  # fmt: skip
def test_embeddings_train_on_pairs(model: str, options: tuple[str, ...], command, tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs.jsonl")
    result = command("train", *PAIRS, f"model={model}", *options, "hydra.run.dir=run")
    assert result.status == 0, result.err
    assert "val/recall@1" in result.out
    pooling = json.loads((tmp_path / "run/model/1_Pooling/config.json").read_text())
    assert sum(pooling[key] for key in pooling if key.startswith("pooling_mode")) == 1
    assert pooling["word_embedding_dimension"] == 32


def test_a_temperature_that_is_typed_on_resume_counts(command, tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs.jsonl")
    options = ("trainer.max_steps=2", "trainer.log_every_n_steps=1", "logger=csv", "hydra.run.dir=run")
    assert command("train", *PAIRS, "model=bert_nano", *options).status == 0
    result = command("train", "resume=run", "trainer.max_steps=4", "objective.temperature=0.5")
    assert result.status == 0, result.err
    with (tmp_path / "run" / "metrics.csv").open() as file:
        rows = {int(row["step"]): row["train/temperature"] for row in csv.DictReader(file) if row["train/temperature"]}
    assert {n: pytest.approx(float(value), rel=1e-5) for n, value in rows.items()} == {1: 0.05, 2: 0.05, 3: 0.5, 4: 0.5}


def test_an_exported_encoder_embeds_as_transformers_with_mean_pooling(command, tmp_path: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    from genai_pl.loading import load
    from genai_pl.models.pooling import pool

    write_pairs(tmp_path / "pairs.jsonl")
    assert command("train", *PAIRS, "model=bert_nano", "hydra.run.dir=run").status == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run/model")
    theirs, ours = AutoModel.from_pretrained(tmp_path / "run/model"), load("run").model
    batch = tokenizer(["what is 3", "it"], return_tensors="pt", padding=True, padding_side="right")
    mask = batch["attention_mask"]
    with torch.no_grad():
        hidden = theirs(batch["input_ids"], attention_mask=mask).last_hidden_state
        expected = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        embedded = pool(ours.features(batch["input_ids"], mask), mask, "mean")
    torch.testing.assert_close(embedded, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("objective=mlm",), "objective=mlm needs a model of shape encoder, not decoder"),
        (("objective=contrastive", "data=text", "model=bert_nano"), "objective=contrastive needs data=pairs, not data=text"),
        (("data=pairs", "data.path=pairs.jsonl"), "objective=clm needs data=text, not data=pairs"),
        (("objective=contrastive", "data=pairs", "model=bert_nano"), "data.path is not set"),
        ((*PAIRS, "model=bert_nano", "data.anchor=q"), "no column 'q'; found: anchor, positive, negative (set data.anchor)"),
        ((*PAIRS, "model=bert_nano", "objective.pooling=max"), "objective.pooling=max is not one of mean, last, cls"),
        (("objective=mlm", "model=bert_nano", "objective.mask_probability=2"), "objective.mask_probability must lie in"),
        (("objective=clm", "model.attention_kind=linformer"), "model.attention_kind=linformer"),
        (("model=hf",), "model.name is not set"),
        (("model=hf", "model.name=nowhere"), "nowhere: transformers cannot load it"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(arguments: tuple[str, ...], message: str, command, tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs.jsonl")
    result = command("train", *arguments)
    assert result.status in (1, 2)
    assert message in result.err
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1
