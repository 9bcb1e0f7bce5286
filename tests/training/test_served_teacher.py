"""A teacher behind OpenAI's completions: what it says, and runs that learn from it, equal those of the model itself."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from genai_pl.config.enums import AttentionBackend
from genai_pl.data import byte_tokenizer
from genai_pl.endpoints import Endpoint
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


def teacher_that_gets(answer: object, monkeypatch: pytest.MonkeyPatch, models: object = None) -> ServedTeacher:
    """A teacher of a byte vocabulary whose server gives an answer to any prompt, with two tokens of a position asked for."""
    listed = {"data": [{"id": "m", "max_model_len": 9}]} if models is None else models
    monkeypatch.setattr(Endpoint, "ask", lambda self, route, body=None: listed if route == "models" else answer)
    return ServedTeacher("http://host/v1", Server(), top_k=2, vocab_size=V)


def echo(*tops: object, **rest: object) -> dict[str, object]:
    """The answer to a prompt of so many tokens."""
    return {"choices": [{"logprobs": {"top_logprobs": list(tops), **rest}}]}


GOOD = {"token_id:5": -0.1, "token_id:3": -4.0}


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({}, "gives no log-probabilities of a prompt"),
        ({"choices": []}, "gives no log-probabilities of a prompt"),
        ({"choices": [{"text": "abc", "logprobs": None}]}, "gives no log-probabilities of a prompt"),
        ({"choices": [{"logprobs": {"top_logprobs": None}}]}, "gives no log-probabilities of a prompt"),
        (echo(None, GOOD, None), "gives no log-probabilities of a prompt"),
        (echo(None, GOOD), "was sent 3 tokens of a prompt and gives log-probabilities of 2"),
        (echo(None, GOOD, {"token_id:5": -0.1}), "gives 1 tokens of a position, and 2 are asked for"),
        (echo(None, GOOD, {}), "gives 0 tokens of a position, and 2 are asked for"),
        (echo(None, GOOD, {" é": -0.1, "🙂": -2.0}), "names tokens by their text, as ' é'"),
        (echo(None, GOOD, {"token_id:5": None, "token_id:3": -1}), "names tokens by their text"),
        (echo(None, GOOD, {"token_id:5": -1, "token_id:05": -1}), "names tokens by their text"),
        (echo(None, GOOD, {"token_id:5": float("nan"), "token_id:3": -1}), "whose probabilities add up to nan"),
        (echo(None, GOOD, {"token_id:5": 2.5, "token_id:3": 1.5}), "whose probabilities add up to 16.66"),
        (echo(None, GOOD, {"token_id:5": -1, "token_id:-3": -1}), "names token -3, and the student has"),
        (echo(None, GOOD, {"token_id:5": -1, "token_id:9999": -1}), "names token 9999, and the student has"),
    ],
)
def test_an_answer_that_teaches_nothing_is_one_line(answer: object, message: str, monkeypatch) -> None:
    teacher = teacher_that_gets(answer, monkeypatch)
    labels = torch.tensor([[7, 8, IGNORED]])
    with pytest.raises(ConfigError) as raised:
        teacher({"input_ids": torch.tensor([[6, 7, 8]])}, labels)
    assert str(raised.value).startswith("objective.teacher=http://host/v1: ")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_token_that_cannot_come_and_a_prompts_own_beside_the_likeliest_are_read(monkeypatch) -> None:
    own = {"token_id:5": -0.5, "token_id:3": -1.0, "token_id:250": -9.0}
    impossible = {"token_id:5": 0.0, "token_id:3": -float("inf")}
    teacher = teacher_that_gets(echo(None, own, impossible), monkeypatch)
    batch, labels = {"input_ids": torch.tensor([[6, 7, 8]])}, torch.tensor([[7, 8, IGNORED]])
    taught = teacher(batch, labels).predict(torch.arange(2))
    assert taught.ids.tolist() == [[5, 3], [5, 3]]
    assert taught.logprobs.isfinite().all()
    torch.testing.assert_close(taught.logprobs.exp().sum(1), torch.ones(2))
    np.testing.assert_allclose(taught.logprobs[0, :2].exp(), np.exp([-0.5, -1.0]), rtol=1e-6)


@pytest.mark.parametrize("models", [{}, {"data": None}, {"data": []}, {"data": ["m"]}, {"data": [{"id": ["m"]}]}])
def test_a_server_without_models_is_one_line(models: object, monkeypatch) -> None:
    with pytest.raises(ConfigError, match=r"^objective.teacher=http://host/v1: lists no models; .* /v1$"):
        teacher_that_gets({}, monkeypatch, models)


def test_texts_of_tokens_are_compared_but_for_halves_of_characters(monkeypatch) -> None:
    tokenizer = byte_tokenizer()
    ids = [round(i * (V - 1) / 7) for i in range(8)]  # a place is kept for a token after them
    names = [tokenizer.decode([token]) for token in ids]
    assert any("\ufffd" in name for name in names)
    for there, message in (
        (names, None),
        ([name.replace("\ufffd", "Ã") for name in names], None),
        (["é", *names[1:]], "token 0 is 'é' there"),
        ([f"token_id:{token}" for token in ids], "names tokens by ids where their texts are asked for"),
        (names[:4], "was sent 8 tokens of a prompt and gives log-probabilities of 4"),
        (None, "gives no log-probabilities of a prompt"),
    ):
        teacher = teacher_that_gets(echo(tokens=there), monkeypatch)
        if message is None:
            teacher.check_tokenizer(tokenizer)
            continue
        with pytest.raises(ConfigError, match=message):
            teacher.check_tokenizer(tokenizer)
