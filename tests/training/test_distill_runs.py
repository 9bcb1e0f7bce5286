"""Distillation as a command: from a teacher beside it, from its file, and from its judgement of what the student writes."""

import json
from pathlib import Path

import pytest
import torch

from tests.conftest import TINY, some
from tests.training.test_alignment import table

SMALL = (*TINY, "optimizer=adamw", "scheduler.warmup_steps=2", "data.seq_len=32")
STUDENT = ("train", "objective=distill", "objective.teacher=teacher", "init_from=teacher", "init_layers=1")
OWN = ["data.path=text.txt", *(option for option in SMALL if not option.startswith(("model.n", "tokenizer")))]
CHAT = ("data=chat", "data.path=chat.jsonl", "data.val_path=chat.jsonl")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of two layers, untrained but not at all uniform, as a folder."""
    from genai_pl.data import byte_tokenizer
    from genai_pl.exporting import export_model
    from genai_pl.models import ModelConfig, build_model

    torch.manual_seed(5)
    tokenizer = byte_tokenizer()
    model = build_model(
        ModelConfig(n_layer=2, n_embd=32, n_head=4, max_seq_len=64, vocab_size=len(tokenizer), init_std=0.2)
    )
    folder = tmp_path_factory.mktemp("teacher") / "model"
    export_model(model, tokenizer, folder, card={})
    return folder


@pytest.fixture
def place(teacher: Path, tmp_path: Path) -> Path:
    (tmp_path / "teacher").symlink_to(teacher)
    rows = [{"prompt": f"{i} is", "completion": " good" if i % 2 else " a bad one"} for i in range(24)]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "text.txt").write_text("".join(f"{i} times {i} is {i * i}. " for i in range(120)))
    return tmp_path


def last(run: Path, name: str) -> float:
    return float(table(run)[-1][name])


def test_a_student_comes_near_its_teacher_and_resumes_exactly(place: Path, command) -> None:
    arguments = (*STUDENT, *OWN, "objective.alpha=0", "optimizer.lr=1e-2", "trainer.max_steps=12")
    result = command(*arguments, "callbacks.checkpoint.every_n_steps=6", "hydra.run.dir=whole")
    assert result.status == 0, result.err
    rows = table(place / "whole")
    assert float(rows[11]["train/divergence"]) < 0.5 * float(rows[0]["train/divergence"])
    assert float(rows[0]["train/loss"]) == pytest.approx(float(rows[0]["train/divergence"]), rel=1e-6)
    assert command("train", "resume=whole/checkpoints/step=000006.ckpt", "hydra.run.dir=whole").status == 0
    assert [row["train/loss"] for row in table(place / "whole")] == [row["train/loss"] for row in rows]


def test_the_loss_is_the_mixture_and_accumulation_changes_nothing(place: Path, command) -> None:
    options = (
        *STUDENT,
        *OWN,
        *CHAT,
        "objective.alpha=0.3",
        "objective.beta=0.5",
        "objective.temperature=2",
        "trainer.max_steps=2",
    )
    assert command(*options, "hydra.run.dir=one").status == 0
    accumulated = ("data.batch_size=1", "trainer.accumulate_grad_batches=4")
    assert command(*options, *accumulated, "hydra.run.dir=four").status == 0
    for one, four in zip(table(place / "one"), table(place / "four"), strict=True):
        for name in ("train/loss", "train/divergence", "train/cross_entropy", "train/grad_norm"):
            if one[name]:
                assert float(one[name]) == pytest.approx(float(four[name]), rel=1e-5)
    row = table(place / "one")[0]
    expected = 0.3 * float(row["train/cross_entropy"]) + 0.7 * 4 * float(row["train/divergence"])
    assert float(row["train/loss"]) == pytest.approx(expected, rel=1e-6)


def test_a_file_of_all_words_but_one_teaches_the_same_and_is_written_once(place: Path, command) -> None:
    options = (*STUDENT, *OWN, *CHAT, "objective.alpha=0.3", "trainer.max_steps=3")
    assert command(*options, "hydra.run.dir=beside").status == 0
    file = ("objective.teacher_cache=cache", "objective.top_k=257")
    result = command(*options, *file, "hydra.run.dir=file")
    assert result.status == 0, result.err
    for name in ("train/loss", "train/divergence", "train/grad_norm"):
        assert last(place / "file", name) == pytest.approx(last(place / "beside", name), rel=2e-3)
    # a writer that was killed goes on: the rows that are marked are not asked for again
    (folder,) = (place / "cache").iterdir()
    done = (folder / "done").read_bytes()
    assert set(done) == {1}
    before = (folder / "logprobs").read_bytes()
    (folder / "done").write_bytes(b"\0" + done[1:])
    again = command(*options, *file, "hydra.run.dir=again")
    assert f"{len(done) - 1} of {len(done)} rows are in" in again.out
    assert (folder / "done").read_bytes() == done
    assert (folder / "logprobs").read_bytes() == before
    assert last(place / "again", "train/loss") == last(place / "file", "train/loss")


OTHER = (
    "train",
    "objective=distill",
    "objective.teacher=teacher",
    "objective.universal=true",
    "data.path=text.txt",
    *SMALL,
)


def test_a_teacher_of_another_tokenizer_teaches_and_resumes_exactly(place: Path, command) -> None:
    options = (*OTHER, "tokenizer=bpe", "tokenizer.vocab_size=300", "objective.alpha=0", "trainer.max_steps=10")
    result = command(*options, "optimizer.lr=1e-2", "callbacks.checkpoint.every_n_steps=5", "hydra.run.dir=whole")
    assert result.status == 0, result.err
    rows = table(place / "whole")
    assert float(rows[-1]["train/divergence"]) < 0.8 * float(rows[0]["train/divergence"])
    assert 0.5 < float(rows[0]["train/paired"]) <= 1
    assert command("train", "resume=whole/checkpoints/step=000005.ckpt", "hydra.run.dir=whole").status == 0
    assert [row["train/loss"] for row in table(place / "whole")] == [row["train/loss"] for row in rows]


@pytest.mark.parametrize("data", [(), pytest.param(CHAT, marks=pytest.mark.slow)], ids=["text", "chat"])
def test_the_student_learns_from_what_it_writes(data: tuple[str, ...], place: Path, command) -> None:
    on_policy = ("objective.student_fraction=0.6", "objective.max_new_tokens=6", "objective.text_prompt_tokens=8")
    options = (*STUDENT, *OWN, *data, *on_policy, "objective.beta=1", "objective.alpha=0", "optimizer.lr=1e-2")
    result = command(*options, "trainer.max_steps=6", "hydra.run.dir=run")
    assert result.status == 0, result.err
    assert "unused" not in result.out
    rows = table(place / "run")
    assert float(rows[-1]["train/divergence"]) < float(rows[0]["train/divergence"])
    whole = [row["train/loss"] for row in rows]
    assert command(*options, "trainer.max_steps=6", "hydra.run.dir=again").status == 0
    assert [row["train/loss"] for row in table(place / "again")] == whole


@pytest.mark.parametrize(
    ("options", "message"),
    some(
        [
            (("objective.teacher=nowhere",), "objective.teacher=nowhere"),
            (
                ("init_from=null", "init_layers=null", "tokenizer=bpe", "tokenizer.vocab_size=300"),
                "its tokenizer is another one",
            ),
            (("objective.beta=2",), "objective.beta must be from 0 to 1, not 2"),
            (("objective.temperature=0",), "objective.temperature must be above 0, not 0"),
            (("objective.top_k=258",), "objective.top_k must be from 1 to 257"),
            (("objective.student_fraction=1", "objective.max_new_tokens=64"), "leaves no room for a prompt"),
            (("objective.top_k=4", "objective.student_fraction=0.5"), "what the student writes is not on disk"),
            (("objective.universal=true", "objective.top_k=4"), "leave objective.top_k null"),
            (("objective.universal=true", *CHAT), "reads texts, not conversations"),
            (("init_layers=3",), "init_layers=3: the model of init_from has 2 layers"),
            (("strategy=tensor_parallel", "trainer.devices=2"), "use strategy=fsdp here"),
            (("dry_run=true",), "dry_run=true does not estimate a teacher"),
        ]
    ),
)
def test_a_mistake_is_one_line(options: tuple[str, ...], message: str, place: Path, command) -> None:
    result = command(*STUDENT, *OWN, *options)
    assert result.status in (1, 2)
    assert result.err.startswith("error: ")
    assert message in result.err
    assert result.err.count("\n") == 1
