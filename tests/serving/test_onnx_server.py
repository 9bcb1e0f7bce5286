"""An ONNX model behind the routes gives the answers of the PyTorch model that it was exported from."""

from pathlib import Path

import pytest

from genai_pl.data import byte_tokenizer
from genai_pl.errors import ConfigError
from genai_pl.loading import load
from genai_pl.models.onnx.export import write_description, write_graphs
from tests.serving.servers import make_service, serving

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@pytest.fixture(scope="module")
def exported(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the exported tiny model."""
    folder = tmp_path_factory.mktemp("onnx")
    model = load(str(tiny)).model
    write_graphs(model, folder)
    write_description(model, folder, token_ids={})
    byte_tokenizer().save_pretrained(folder)
    return folder


def test_texts_are_those_of_the_torch_model(tiny: Path, exported: Path):
    texts = {}
    for backend, folder in {"local": tiny, "onnx": exported}.items():
        with serving(make_service(folder, backend=backend)) as client:
            # one greedy, one drawn with a seed: both depend on every logit
            bodies = [{"prompt": "abc"}, {"prompt": "once", "temperature": 1.0, "seed": 5, "max_new_tokens": 12}]
            texts[backend] = [client.post("/generate", json=body).json()["text"] for body in bodies]
    assert texts["onnx"] == texts["local"]
    assert all(texts["onnx"])


def test_it_writes_only(exported: Path):
    with serving(make_service(exported, backend="onnx")) as client:
        answer = client.post("/v1/embeddings", json={"input": "abc"})
    assert answer.status_code == 400
    assert "is an ONNX model, which writes only" in answer.text


def test_another_folder_is_refused(tiny: Path):
    with pytest.raises(ConfigError, match=r"backend=onnx: .* is no ONNX model"):
        make_service(tiny, backend="onnx")
