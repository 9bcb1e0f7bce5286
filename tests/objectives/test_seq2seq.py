"""Sequence to sequence against T5 of transformers, packed and not, and from columns to a translation."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from genai_pl.data.packing import PackedPairs
from genai_pl.errors import ConfigError
from genai_pl.models import ModelConfig, build_model, save_pretrained
from genai_pl.modules.seq2seq import Seq2SeqModule
from genai_pl.objectives import IGNORED, Seq2SeqCollator, SpecialTokens

END, PAD, SIZE = 60, 0, 61
VOCABULARY = SpecialTokens(size=SIZE, pad=PAD, end=END, n_bytes=np.ones(SIZE, np.int64))
MODEL = {
    "shape": "encoder_decoder",
    "n_layer": 2,
    "n_head": 4,
    "n_embd": 32,
    "vocab_size": SIZE,
    "max_seq_len": 24,
    "position": "relative",
    "norm": "rmsnorm",
    "bias": False,
    "activation": "relu",
    "attention_scale": 1.0,
    "scale_head": True,
}


def pairs(n: int = 5) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 8, (n, 2)).tolist()
    return [tuple(np.append(rng.integers(1, END, k), END) for k in pair) for pair in lengths]


def row(*chosen: tuple[np.ndarray, np.ndarray]) -> dict:
    found = {}
    for role, texts in zip(("source", "target"), zip(*chosen, strict=True), strict=True):
        found[role] = np.concatenate(texts)
        found[f"{role}_segments"] = np.concatenate([np.full(len(text), n) for n, text in enumerate(texts, start=1)])
    return found


@pytest.fixture(scope="module")
def module() -> Seq2SeqModule:
    torch.manual_seed(0)
    model = build_model(ModelConfig(**MODEL))
    for parameter in model.parameters():  # away from zeros and ones, so that nothing cancels
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return Seq2SeqModule(model.eval(), vocabulary=VOCABULARY, seed=0, optimizer=None, schedule=None)


@pytest.fixture(scope="module")
def t5_losses(module: Seq2SeqModule, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """What each pair alone costs a T5 of transformers with the same weights."""
    from transformers import AutoModelForSeq2SeqLM

    folder = tmp_path_factory.mktemp("t5")
    save_pretrained(module.model, folder, token_ids={"pad_token_id": PAD, "eos_token_id": END, "bos_token_id": END})
    theirs = AutoModelForSeq2SeqLM.from_pretrained(folder)
    losses = []
    for source, target in pairs():
        loss = theirs(input_ids=torch.tensor(source)[None], labels=torch.tensor(target)[None]).loss
        losses.append(loss.item() * len(target))
    return losses


def test_the_loss_is_that_of_t5(module: Seq2SeqModule, t5_losses: list[float]) -> None:
    batch = module.collator([row(pair) for pair in pairs()])
    assert batch["targets"] == sum(len(target) for _, target in pairs())
    with torch.no_grad():
        loss = module.step(batch)["loss"]
    torch.testing.assert_close(loss.item(), sum(t5_losses), rtol=1e-5, atol=1e-4)


def test_pairs_of_a_packed_row_cost_what_each_costs_alone(module: Seq2SeqModule, t5_losses: list[float]) -> None:
    first, second, *rest = pairs()
    batch = module.collator([row(first, second), row(*rest)])
    with torch.no_grad():
        torch.testing.assert_close(module.step(batch)["loss"].item(), sum(t5_losses), rtol=1e-5, atol=1e-4)


def test_the_decoder_begins_each_target_with_the_pad_token() -> None:
    source = np.array([5, END])
    batch = Seq2SeqCollator(vocabulary=VOCABULARY)([row((source, np.array([7, 8, END])), (source, np.array([9, END])))])
    assert batch["decoder_input_ids"].tolist() == [[PAD, 7, 8, PAD, 9]]
    assert batch["labels"].tolist() == [[7, 8, END, 9, END]]
    assert batch["input_ids"].tolist() == [[5, END, 5, END]]
    assert batch["segment_ids"].tolist() == [[1, 1, 2, 2]]
    assert batch["decoder_segment_ids"].tolist() == [[1, 1, 1, 2, 2]]


def test_padding_is_no_target_and_full_rows_need_no_segments() -> None:
    short, long = (np.array([5, END]), np.array([7, END])), (np.array([5, 6, END]), np.array([7, 8, END]))
    collate = Seq2SeqCollator(vocabulary=VOCABULARY)
    batch = collate([row(short), row(long)])
    assert batch["labels"].tolist() == [[7, END, IGNORED], [7, 8, END]]
    assert batch["segment_ids"].tolist() == batch["decoder_segment_ids"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert "segment_ids" not in collate([row(long), row(long)])


def test_a_tokenizer_without_an_end_is_refused() -> None:
    with pytest.raises(ConfigError, match="end-of-text"):
        Seq2SeqCollator(vocabulary=SpecialTokens(size=SIZE))


def test_an_encoder_decoder_learns_pairs_and_writes_them(command, tmp_path: Path) -> None:
    words = {"eins": "one", "zwei": "two"}
    lines = [json.dumps({"de": de, "en": en}) + "\n" for de, en in words.items()]
    for name, text in (("train.jsonl", "".join(lines * 16)), ("val.jsonl", "".join(lines))):
        (tmp_path / name).write_text(text)
    result = command(
        *("train", "objective=seq2seq", "model=t5_nano", "tokenizer=byte", "model.n_embd=64", "model.max_seq_len=32"),
        *("model.n_layer=1", "model.n_decoder_layer=1", "data.path=train.jsonl", "data.val_path=val.jsonl"),
        *(
            "data.source=de",
            "data.target=en",
            "data.batch_size=8",
            "trainer.max_steps=120",
            "optimizer.lr=1e-2",
            "scheduler.warmup_steps=5",
        ),
        *("callbacks.samples.every_n_steps=null", "hydra.run.dir=run"),
    )
    assert (result.status, result.err) == (0, "")
    result = command("generate", "checkpoint=run", "prompt=zwei", "generation=greedy", "generation.max_new_tokens=10")
    assert result.out == "zwei\ntwo\n"


def test_a_column_that_is_not_there_is_named(command, tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text('{"de": "eins", "en": "one"}\n' * 4)
    result = command("train", "objective=seq2seq", "model=t5_nano", "data.path=pairs.jsonl")
    assert "no column 'source'; found: de, en (set data.source)" in result.err
    assert result.err.count("\n") == 1


def test_every_pair_stands_in_one_row_where_both_its_texts_have_room() -> None:
    from datasets import Dataset

    sources, targets = zip(*pairs(20), strict=True)
    table = Dataset.from_dict({"source": list(sources), "target": list(targets)}).with_format("numpy")
    packed = PackedPairs(table, 16)
    texts = {role: [] for role in ("source", "target")}
    for n in range(len(packed)):
        for role, found in texts.items():
            assert len(packed[n][role]) <= 16
            found += np.split(packed[n][role], np.flatnonzero(np.diff(packed[n][f"{role}_segments"])) + 1)
    assert len(packed) < 20
    key = {tuple(s): t.tolist() for s, t in zip(sources, targets, strict=True)}
    assert {tuple(s): t.tolist() for s, t in zip(*texts.values(), strict=True)} == key
    assert len(PackedPairs(table, 0)) == 20
