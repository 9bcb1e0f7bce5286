"""Distillation on two processes: the teacher whole on each, the student copied or sharded, its completions among the rows."""

from pathlib import Path

import pytest

from tests.strategies.processes import MODEL, assert_same, train

SMALL = (
    "tokenizer=byte", "data.path=text.txt", "data.seq_len=48", "scheduler=constant", "scheduler.warmup_steps=0",
    "trainer.log_every_n_steps=1", "callbacks.samples.every_n_steps=null", "logger=csv", "optimizer=sgd", "optimizer.lr=0.05",
)  # fmt: skip
MODEL_SIZE = ("model.n_layer=2", "model.n_embd=32", "model.n_head=4", "model.max_seq_len=64")
STUDENT = (
    "objective=distill", "objective.teacher=teacher", "init_from=teacher", "init_layers=1", "trainer.max_steps=4",
    "objective.alpha=0.3", "objective.beta=0.5",
)  # fmt: skip
ON_POLICY = ("objective.student_fraction=0.5", "objective.max_new_tokens=8", "objective.text_prompt_tokens=12")
OFFLINE = ("objective.top_k=16", "objective.teacher_cache=cache")
TWO = {"ddp": ("trainer=ddp", "trainer.devices=2"), "fsdp": ("trainer=fsdp", "trainer.devices=2")}
SAME = ("train/loss", "train/divergence", "train/grad_norm", "val/loss")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text, and a teacher that has learned a little of it."""
    path = tmp_path_factory.mktemp("distill")
    (path / "text.txt").write_text("".join(f"{n} times {n} is {n * n}. " for n in range(300)))
    options = [option for option in SMALL if "optimizer" not in option]
    train(path, *options, *MODEL_SIZE, "optimizer=adamw", "optimizer.lr=1e-2", "trainer.max_steps=20", "data.batch_size=8",
          "hydra.run.dir=teacher")  # fmt: skip
    return path


@pytest.mark.slow
@pytest.mark.parametrize("how", ["beside", "offline"])
def test_two_processes_take_the_steps_of_one(how: str, folder: Path) -> None:
    options = [option for option in SMALL if not option.startswith("tokenizer")]
    options += [*STUDENT, *(OFFLINE if how == "offline" else ())]
    train(folder, *options, "data.batch_size=4", f"hydra.run.dir={how}-one")
    for name, strategy in TWO.items():
        train(folder, *options, "data.batch_size=2", *strategy, f"hydra.run.dir={how}-{name}")
        assert_same(folder / f"{how}-{name}", folder / f"{how}-one", names=SAME, exported=MODEL, rounding=1e-5)


@pytest.mark.slow
def test_two_processes_learn_what_one_does_from_what_the_student_writes_greedily(folder: Path) -> None:
    options = [option for option in SMALL if not option.startswith("tokenizer")]
    options += [*STUDENT, *ON_POLICY, "objective.sampling_temperature=0"]
    train(folder, *options, "data.batch_size=4", "hydra.run.dir=greedy-one")
    for name, strategy in TWO.items():
        train(folder, *options, "data.batch_size=2", *strategy, f"hydra.run.dir=greedy-{name}")
        assert_same(folder / f"greedy-{name}", folder / "greedy-one", names=SAME, exported=MODEL, rounding=1e-5)


@pytest.mark.slow
def test_a_sharded_student_writes_and_learns_what_copies_do(folder: Path) -> None:
    options = [option for option in SMALL if not option.startswith("tokenizer")]
    for name, strategy in TWO.items():
        train(folder, *options, *STUDENT, *ON_POLICY, "data.batch_size=2", *strategy, f"hydra.run.dir=writes-{name}")
    assert_same(folder / "writes-fsdp", folder / "writes-ddp", names=SAME, exported=MODEL, rounding=1e-5)
