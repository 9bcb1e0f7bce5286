"""export.py format=gguf as a user runs it: the folder, its Modelfile, what reads it, and refusals in one line."""

from importlib import util
from pathlib import Path

import pytest
import torch
from conftest import Result
from gguf_models import write_model

from genai_pl.cli.export_gguf import modelfile
from genai_pl.loading import load
from genai_pl.models.hf.folder import read_json, write_json

pytest.importorskip("gguf", reason="GGUF files are written by the package gguf")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_model("llama", tmp_path / "hf", dtype="bfloat16")
    return tmp_path / "hf"


def export(command, model: Path, *arguments: str) -> Result:
    return command("export", f"checkpoint={model}", "format=gguf", "out=out", *arguments)


def test_a_folder_is_exported_generated_from_and_exported_again(command, model: Path, tmp_path: Path):
    file = model / "generation_config.json"
    write_json(file, {**read_json(file), "do_sample": True, "temperature": 0.6, "repetition_penalty": 1.1})
    result = export(command, model)
    assert result.status == 0, result.err
    assert "read by llama.cpp, Ollama (ollama create NAME -f out/Modelfile), generate.py and serve.py" in result.out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["Modelfile", "model.gguf"]
    lines = (tmp_path / "out" / "Modelfile").read_text().splitlines()
    sampling = ["temperature 0.6", "top_k 50", "top_p 1.0", "repeat_penalty 1.1", 'stop "<|endoftext|>"']
    assert lines == ["FROM ./model.gguf", "PARAMETER num_ctx 256", *(f"PARAMETER {line}" for line in sampling)]
    # the file, by its name and by its folder, gives the same text; both ways back give the weights in their dtype
    texts = [
        command(
            "generate", f"checkpoint={name}", "prompt=It is", "generation=greedy", "generation.max_new_tokens=8"
        ).out
        for name in (model, "out", "out/model.gguf")
    ]
    assert texts[0].splitlines()[-1] == texts[1].splitlines()[-1] == texts[2].splitlines()[-1]
    assert command("export", "checkpoint=out", "format=hf", "out=back").status == 0
    before, after = (
        load(str(folder), dtype=torch.bfloat16).model.state_dict() for folder in (model, tmp_path / "back")
    )
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert read_json(tmp_path / "back" / "config.json")["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quantize=q4_k_m"], "llama-quantize model.gguf model-q4_k_m.gguf q4_k_m"),
        (["quantize=int8"], "quantize=int8 is not one of f32, f16, bf16, q8_0"),
        (["dtype=fp16"], "format=gguf has quantize= for the type of its numbers"),
        (["format=hf", "quantize=q8_0"], "quantize=q8_0 goes with format=onnx (int8) or format=gguf (f32, f16"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], message: str, command, model: Path, tmp_path: Path):
    result = export(command, model, *arguments)
    assert result.status
    assert message in result.err
    assert result.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_missing_package_is_one_line(command, model: Path, monkeypatch: pytest.MonkeyPatch):
    find = util.find_spec
    absent = "genai_pl.models.gguf.package.find_spec"
    monkeypatch.setattr(absent, lambda name: None if name == "gguf" else find(name))
    result = export(command, model)
    assert "format=gguf needs the package gguf: pip install gguf" in result.err
    Path("m.gguf").write_bytes(b"GGUF")
    result = command("generate", "checkpoint=m.gguf", "prompt=a")
    assert "m.gguf: a GGUF file, which needs the package gguf: pip install gguf" in result.err


def test_a_modelfile_quotes_end_tokens_and_is_greedy_where_the_folder_is():
    text = modelfile({"do_sample": False, "top_p": 0.5}, ends=['a"b\\'], context=100_000)
    assert text.splitlines()[1:] == ["PARAMETER num_ctx 4096", "PARAMETER temperature 0", r'PARAMETER stop "a\"b\\"']
