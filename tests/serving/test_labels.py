"""Classes and relevance over HTTP, in the forms of vLLM and Jina, with the probabilities of transformers."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("fastapi", reason="needs pip install -e '.[serve]'")

from transformers import AutoModelForSequenceClassification, AutoTokenizer

from genai_pl.config.labels import MULTI, REGRESSION, SINGLE, Labels
from tests.serving.servers import make_service, serving, write_model

SMALL = {"position": "rotary", "norm": "rmsnorm", "gated_mlp": True, "activation": "silu", "bias": False}
TEXTS = ["a text", "another text, which is longer"]


def classifier(folder: Path, labels: Labels) -> Path:
    return write_model(folder, **SMALL, head="score", n_labels=len(labels.names), extra=labels.values())


def theirs(folder: Path, *texts: str) -> torch.Tensor:
    """The outputs (K,) of transformers for one text or pair."""
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        return model(**tokenizer(*texts, return_tensors="pt")).logits[0]


@pytest.mark.parametrize("problem", [SINGLE, MULTI])
def test_classify_answers_as_vllm_with_the_probabilities_of_transformers(problem: str, tmp_path: Path) -> None:
    folder = classifier(tmp_path / "model", Labels(("no", "maybe", "yes"), problem))
    with serving(make_service(folder)) as client:
        reply = client.post("/classify", json={"input": TEXTS}).json()
        ids = client.post("/v1/classify", json={"input": [*TEXTS[0].encode()]}).json()
        pair = client.post("/classify", json={"input": "a", "text_pair": "b"}).json()
        for path, body in (
            ("/score", {"text": "x"}),
            ("/v1/embeddings", {"input": "x"}),
            ("/generate", {"prompt": "x"}),
        ):
            refused = client.post(path, json=body)
            assert refused.status_code == 400
            assert "label" in refused.json()["error"]["message"]
        assert client.post("/rerank", json={"query": "q", "documents": ["d"]}).status_code == 400
        assert client.post("/classify", json={"input": ["a"], "text_pair": ["b", "c"]}).status_code == 422
        assert client.post("/classify", json={"input": "x" * 200}).status_code == 400
        for given, message in (
            ([], "input: List should have at least 1 item"),
            ([3, 10**6], "token 1000000 is not one"),
        ):
            error = client.post("/classify", json={"input": given}).json()["error"]
            assert (message in error["message"], error["param"]) == (True, "input"), error
    assert (reply["object"], reply["usage"]["prompt_tokens"]) == ("list", sum(map(len, TEXTS)))
    activation = torch.sigmoid if problem == MULTI else lambda x: x.softmax(-1)
    for n, (entry, text) in enumerate(zip(reply["data"], TEXTS, strict=True)):
        expected = activation(theirs(folder, text))
        assert entry["probs"] == pytest.approx(expected.tolist(), abs=1e-5)
        assert (entry["index"], entry["num_classes"]) == (n, 3)
        assert entry["label"] == ("no", "maybe", "yes")[expected.argmax()]
    assert ids["data"][0]["probs"] == pytest.approx(reply["data"][0]["probs"], abs=1e-6)
    assert pair["data"][0]["probs"] == pytest.approx(activation(theirs(folder, "a", "b")).tolist(), abs=1e-5)


def test_rerank_answers_as_jina_with_the_most_relevant_document_first(tmp_path: Path) -> None:
    folder = classifier(tmp_path / "model", Labels(("relevance",), pairs=True))
    documents = ["one", "two two", "three"]
    with serving(make_service(folder)) as client:
        reply = client.post("/rerank", json={"query": "q", "documents": documents}).json()
        short = client.post("/v1/rerank", json={"query": "q", "documents": [{"text": d} for d in documents], "top_n": 2,
                                                "return_documents": False}).json()  # fmt: skip
        assert client.post("/v2/rerank", json={"query": "q", "documents": []}).status_code == 422
        alone = client.post("/classify", json={"input": "a document without its query"})
        assert (alone.status_code, alone.json()["error"]["param"]) == (422, "text_pair")
    expected = {n: theirs(folder, "q", document).sigmoid().item() for n, document in enumerate(documents)}
    order = sorted(expected, key=expected.get, reverse=True)
    assert [entry["index"] for entry in reply["results"]] == order
    for entry in reply["results"]:
        assert entry["relevance_score"] == pytest.approx(expected[entry["index"]], abs=1e-5)
        assert entry["document"] == {"text": documents[entry["index"]]}
    assert [entry["index"] for entry in short["results"]] == order[:2]
    assert "document" not in short["results"][0]
    assert reply["usage"]["total_tokens"] == sum(len("q") + len(document) for document in documents)


def test_scores_of_pairs_answer_as_vllm_in_the_order_of_the_request(tmp_path: Path) -> None:
    folder = classifier(tmp_path / "model", Labels(("relevance",), pairs=True))
    with serving(make_service(folder)) as client:
        many = client.post("/v1/score", json={"text_1": "q", "text_2": ["one", "two two"]}).json()
        pairs = client.post("/v1/score", json={"queries": ["a", "b"], "documents": ["one", "two two"]}).json()
        alone = client.post("/v1/score", json={"text_1": "q", "text_2": "one"}).json()
        for body, message in (
            ({"text_1": ["a", "b"], "text_2": ["c"]}, "2 texts in text_1 for 1 in text_2"),
            ({"text_1": "a", "text_2": ["c"], "top_n": 1}, "top_n: no such option"),
            ({"text_1": "a"}, "text_2: Field required"),
        ):
            refused = client.post("/v1/score", json=body)
            assert (refused.status_code, message in refused.json()["error"]["message"]) == (422, True), refused.text
    for reply, expected in (
        (many, [("q", "one"), ("q", "two two")]),
        (pairs, [("a", "one"), ("b", "two two")]),
        (alone, [("q", "one")]),
    ):
        assert (reply["object"], [entry["index"] for entry in reply["data"]]) == ("list", [*range(len(expected))])
        scores = [theirs(folder, *pair).sigmoid().item() for pair in expected]
        assert [entry["score"] for entry in reply["data"]] == pytest.approx(scores, abs=1e-5)
        assert reply["usage"]["total_tokens"] == sum(len(a) + len(b) for a, b in expected)


def test_a_regression_of_single_texts_is_no_relevance(tmp_path: Path) -> None:
    with serving(make_service(classifier(tmp_path / "model", Labels(("stars",), REGRESSION)))) as client:
        refused = client.post("/rerank", json={"query": "q", "documents": ["d"]})
    assert refused.status_code == 400
    assert "no relevance" in refused.json()["error"]["message"]
