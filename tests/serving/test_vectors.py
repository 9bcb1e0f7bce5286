"""Embeddings and scores, against transformers."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("fastapi", reason="needs pip install -e '.[serve]'")

from tests.serving.servers import make_service, serving, write_model

TEXTS = ["A short text", "something longer than that, with a comma", "x"]
PLACES = {"mean": "pooling_mode_mean_tokens", "last": "pooling_mode_lasttoken", "cls": "pooling_mode_cls_token"}
SMALL = {"position": "rotary", "norm": "rmsnorm", "gated_mlp": True, "activation": "silu", "bias": False}


def encoder(folder: Path) -> Path:
    """A small BERT."""
    options = {"shape": "encoder", "norm_order": "post", "embed_norm": True, "activation": "gelu", "n_token_types": 2}
    return write_model(folder, **options, norm_eps=1e-12, head="transform", head_bias=True)


def expected(folder: Path, pooling: str, texts: list[str]) -> torch.Tensor:
    """Embeddings of each text alone by transformers' model, pooled in the test."""
    from transformers import AutoModel, AutoTokenizer

    model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    vectors = []
    for text in texts:
        ids = torch.tensor([[*tokenizer(text).input_ids, tokenizer.eos_token_id]])
        with torch.no_grad():
            hidden = model(ids).last_hidden_state[0]
        vector = {"mean": hidden.mean(0), "last": hidden[-1], "cls": hidden[0]}[pooling]
        vectors.append(vector / vector.norm())
    return torch.stack(vectors)


@pytest.mark.parametrize("pooling", ["mean", "last", "cls"])
@pytest.mark.parametrize("shape", ["encoder", "decoder"])
def test_embeddings_are_those_of_transformers(shape: str, pooling: str, tiny: Path, tmp_path: Path) -> None:
    folder = tiny if shape == "decoder" else encoder(tmp_path / "bert")
    with serving(make_service(folder, pooling=pooling)) as client:
        result = client.post("/v1/embeddings", json={"input": TEXTS}).json()
    vectors = torch.tensor([entry["embedding"] for entry in result["data"]])
    assert [entry["index"] for entry in result["data"]] == [0, 1, 2]
    torch.testing.assert_close(vectors, expected(folder, pooling, TEXTS), atol=1e-5, rtol=0)
    assert result["usage"]["prompt_tokens"] == sum(len(text) + 1 for text in TEXTS)  # bytes, and an end


@pytest.mark.parametrize("pooling", PLACES)
def test_the_folder_says_how_its_embeddings_are_made(pooling: str, tmp_path: Path) -> None:
    folder = encoder(tmp_path / "bert")
    assert make_service(folder).pooling == "mean"
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(
        json.dumps({name: kind == pooling for kind, name in PLACES.items()})
    )
    assert make_service(folder).pooling == pooling


def test_an_encoder_writes_nothing_and_says_so(tmp_path: Path) -> None:
    with serving(make_service(encoder(tmp_path / "bert"))) as client:
        for path, body in (
            ("/generate", {"prompt": "x"}),
            ("/v1/completions", {"prompt": "x"}),
            ("/score", {"text": "x"}),
        ):
            reply = client.post(path, json=body)
            assert reply.status_code == 400
            assert "embeddings" in reply.json()["error"]["message"]
        too_long = client.post("/v1/embeddings", json={"input": "x" * 300})
        assert too_long.status_code == 400
        assert "301 tokens" in too_long.json()["error"]["message"]
        assert "128" in too_long.json()["error"]["message"]


def test_a_language_model_gives_the_log_probability_of_a_text(tiny: Path, client) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny)

    def logprob(text: bytes, n_given: int) -> float:
        ids = torch.tensor([list(text)])
        with torch.no_grad():
            logprobs = model(ids).logits[0, :-1].log_softmax(-1)
        return float(logprobs.gather(1, ids[0, 1:, None])[n_given - 1 :].sum())

    reply = client.post("/score", json={"text": TEXTS[:2]}).json()
    assert reply["kind"] == "log_probability"
    for entry, text in zip(reply["scores"], TEXTS, strict=False):
        assert entry["score"] == pytest.approx(logprob(text.encode(), 1), abs=1e-3)
        assert entry["n_tokens"] == len(text) - 1  # the first has nothing before it
    result = client.post("/score", json={"prompt": "Once", "text": [" upon", " a time"]}).json()["scores"]
    assert [entry["n_tokens"] for entry in result] == [5, 7]
    assert result[1]["score"] == pytest.approx(logprob(b"Once a time", 4), abs=1e-3)
    wrong = client.post("/score", json={"prompt": ["a", "b"], "text": ["c"]})
    assert wrong.status_code == 422
    assert "2 prompts for 1 texts" in wrong.json()["error"]["message"]


def test_a_reward_model_gives_the_scores_of_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    folder = write_model(tmp_path / "reward", head="score", **SMALL)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    with serving(make_service(folder)) as client:
        result = client.post("/score", json={"prompt": "Q: ", "text": ["good", "a longer answer"]}).json()
        assert result["kind"] == "reward"
        assert client.post("/v1/embeddings", json={"input": "x"}).status_code == 400
        assert "scores" in client.post("/generate", json={"prompt": "x"}).json()["error"]["message"]
    for entry, text in zip(result["scores"], [b"Q: good", b"Q: a longer answer"], strict=True):
        with torch.no_grad():
            score = float(model(torch.tensor([[*text, 256]])).logits)
        assert entry["score"] == pytest.approx(score, abs=1e-5)
        assert entry["n_tokens"] == len(text) + 1


NOT_FINITE = {
    "vector": ("/v1/embeddings", {"input": "x y"}),
    "vector in base64": ("/v1/embeddings", {"input": ["x y", "z"], "encoding_format": "base64"}),
    "score": ("/score", {"text": "x y"}),
    "prompt": ("/v1/completions", {"prompt": "x y", "echo": True, "max_tokens": 0, "logprobs": 2}),
}


@pytest.mark.parametrize("kind", NOT_FINITE)
def test_values_that_are_not_finite_are_an_error_and_never_an_answer(
    kind: str, tiny: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, body = NOT_FINITE[kind]
    service = make_service(tiny)
    with torch.no_grad():
        next(service.model.parameters()).fill_(float("nan"))
    with serving(service) as client:
        result = client.post(path, json=body)
    assert result.status_code == 500
    assert result.json()["error"]["message"].startswith("the model failed; the log has the reason (request ")
    assert "the model's values for a request are not finite" in caplog.text
    assert "Traceback" not in caplog.text
