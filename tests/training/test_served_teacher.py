"""A teacher behind OpenAI's completions: what it says, and runs that learn from it, equal those of the model itself."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from genai_pl.config.enums import AttentionBackend
from genai_pl.data import byte_tokenizer
from genai_pl.errors import ConfigError
from genai_pl.kernels.distillation import top_logprobs
from genai_pl.loading import load
from genai_pl.modules.served_teacher import ServedTeacher, Server
from genai_pl.modules.teachers import ModelTeacher
from genai_pl.objectives import IGNORED
from genai_pl.objectives.clm import next_token_batch
from tests.conftest import TINY
from tests.serving.servers import make_service, serving, write_model
from tests.training.test_alignment import table

V = len(byte_tokenizer())
OWN = [option for option in TINY if not option.startswith(("model.", "tokenizer"))]
RUN = ("train", "objective=distill", "init_from=teacher", "data.seq_len=32", "optimizer=adamw", *OWN)
ALONE = ("objective.alpha=0", "scheduler.warmup_steps=1")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    write_model(folder / "teacher", template=False, max_seq_len=64)
    return folder


@pytest.fixture(scope="module")
def url(place: Path) -> Iterator[str]:
    with serving(make_service(place / "teacher"), keys=("secret",)) as client:
        yield f"{client.base_url}/v1"


@pytest.fixture
def here(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TEACHER_KEY", "secret")
    (tmp_path / "teacher").symlink_to(place / "teacher")
    (tmp_path / "text.txt").write_text("".join(f"{i} times {i} is {i * i}. " for i in range(60)))
    rows = [{"prompt": f"{i} is", "completion": " good" if i % 2 else " a bad one"} for i in range(8)]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_a_server_says_what_the_model_beside_the_student_says(url: str, place: Path, monkeypatch) -> None:
    monkeypatch.setenv("TEACHER_KEY", "secret")
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, 256, (n,), generator=generator).numpy() for n in (21, 17)]
    documents = [torch.tensor([1] * 9 + [2] * 11 + [3]).numpy(), torch.tensor([1] * 2 + [2] * 15).numpy()]
    batch = next_token_batch(rows, documents, pad=0)
    labels = batch["labels"]
    labels[0, 2:5] = IGNORED  # a part of a conversation that is not learned
    model = load(str(place / "teacher"), attention=AttentionBackend.auto).model
    exact = ModelTeacher(model, temperature=1.0)(batch, labels).predict
    learned = (labels.flatten() != IGNORED).nonzero()[:, 0]
    expected = top_logprobs(exact(learned).logprobs.double(), 7)
    teacher = ServedTeacher(url, Server(key_variable="TEACHER_KEY"), top_k=7, vocab_size=V)
    found = teacher(batch, labels).predict(learned)
    assert (found.ids == expected.ids).all()
    torch.testing.assert_close(found.logprobs.double(), expected.logprobs, atol=2e-5, rtol=0)


def test_a_student_of_a_server_learns_what_that_of_the_model_learns(url: str, here: Path, command) -> None:
    new = ("init_from=null", "tokenizer=byte", "model.n_layer=1", "model.n_embd=32", "model.max_seq_len=32")
    options = (*RUN, *new, *ALONE, "data.path=text.txt", "objective.teacher_cache=cache")
    beside = ("objective.teacher=teacher", "objective.top_k=20", "hydra.run.dir=beside")
    assert command(*options, *beside).status == 0
    served = (f"objective.teacher={url}", "objective.server.key_variable=TEACHER_KEY")
    result = command(*options, *served, "hydra.run.dir=served")
    assert result.status == 0, result.err
    assert command(*options, *served, "objective.top_k=20", "hydra.run.dir=file").status == 0
    for name in ("train/loss", "train/divergence", "train/grad_norm"):
        values = [[float(row[name]) for row in table(here / run) if row[name]] for run in ("beside", "served", "file")]
        assert values[1] == pytest.approx(values[0], rel=2e-3, abs=2e-6)  # a file has float16
        assert values[2] == pytest.approx(values[0], rel=2e-3, abs=2e-6)
    # the key is in no file of the run
    files = [path for path in (here / "served").rglob("*") if path.is_file()]
    assert files
    assert not any(b"secret" in path.read_bytes() for path in files)
    # a foreign run folder may not choose an address: it has to be typed again
    resumed = command("train", "resume=served", "trainer.max_steps=5")
    assert "is a network address" in resumed.err


def test_a_server_judges_what_the_student_writes(url: str, here: Path, command) -> None:
    served = (f"objective.teacher={url}", "objective.server.key_variable=TEACHER_KEY")
    on_policy = ("objective.student_fraction=1", "objective.max_new_tokens=6", "objective.beta=1")
    data = ("data=chat", "data.path=chat.jsonl", "data.val_path=chat.jsonl", "trainer.max_steps=2")
    result = command(*RUN, *ALONE, *served, *on_policy, *data, "hydra.run.dir=run")
    assert result.status == 0, result.err
    # the student is the teacher at first, and nearly so after a step
    assert abs(float(table(here / "run")[0]["train/divergence"])) < 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("objective.server.key_variable=NO_KEY",), "no answer (401"),
        (("objective.server.model=other",), "objective.server.model=other is not there; found: "),
        (("objective.server.top_k=40",), "no answer (422"),
        (("objective.server.retries=-1",), "objective.server.retries must be at least 0, not -1"),
        (("objective.server.timeout=soon",), "objective.server.timeout=soon: expected a number"),
        (("objective.temperature=2",), "gives probabilities at temperature 1; set objective.temperature=1"),
        (("objective.universal=true",), "needs all probabilities"),
        (
            ("init_from=null", "tokenizer=bpe", "tokenizer.vocab_size=258", "model.max_seq_len=32"),
            "tokenizer is another",
        ),
        (("data.seq_len=64",), "reads at most 63 tokens"),
    ],
)
def test_a_mistake_is_one_line(options: tuple[str, ...], message: str, url: str, here: Path, command) -> None:
    served = (f"objective.teacher={url}", "objective.server.key_variable=TEACHER_KEY")
    result = command(*RUN, "data.path=text.txt", *served, *options)
    assert result.status in (1, 2)
    assert result.err.startswith("error: ")
    assert message in result.err
    assert result.err.count("\n") == 1


def test_names_that_are_no_ids_are_refused() -> None:
    teacher = object.__new__(ServedTeacher)
    from genai_pl.endpoints import Endpoint

    teacher.endpoint, teacher.top_k = Endpoint("http://host/v1", "objective.teacher"), 2
    assert teacher._likeliest({"token_id:5": -0.1, "token_id:3": -0.5, "token_id:9": -4.0}) == [(5, -0.1), (3, -0.5)]
    with pytest.raises(ConfigError, match="names tokens by their text, as ' the'"):
        teacher._likeliest({" the": -0.1, " a": -2.0})
    with pytest.raises(ConfigError, match="gives 1 tokens of a position, and 2 are asked for"):
        teacher._likeliest({"token_id:5": -0.1})
