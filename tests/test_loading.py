"""Loading by reference: stored dtypes, tokens that an adapter brings, and folders without a model."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from genai_pl.checkpoints.file import MARK
from genai_pl.errors import CheckpointError
from genai_pl.loading import load
from tests.conftest import TINY

GPT = (*TINY, "trainer.max_steps=1", "trainer.limit_val_batches=0")


def dtypes(folder: Path) -> set[torch.dtype]:
    return {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()}


def halve(folder: Path) -> dict[str, torch.Tensor]:
    """Store the weights of a folder in bf16."""
    file = folder / "model.safetensors"
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    return tensors


def test_export_writes_the_dtype_that_weights_were_stored_in(command, tmp_path: Path) -> None:
    assert command("train", *GPT, "callbacks.export=true", "hydra.run.dir=run").status == 0
    tensors = halve(tmp_path / "run" / "model")
    result = command("export", "checkpoint=run/model", "format=hf", "out=same")
    assert result.status == 0, result.err
    same = load_file(tmp_path / "same" / "model.safetensors")
    assert all(torch.equal(same[name], tensor) for name, tensor in tensors.items())
    assert same.keys() == tensors.keys()
    assert json.loads((tmp_path / "same" / "config.json").read_text())["dtype"] == "bfloat16"
    assert command("export", "checkpoint=run/model", "format=hf", "dtype=fp32", "out=whole").status == 0
    assert dtypes(tmp_path / "whole") == {torch.float32}


def test_a_merged_adapter_has_the_dtype_of_its_base(command, tmp_path: Path) -> None:
    assert command("train", *GPT, "callbacks.export=true", "hydra.run.dir=run").status == 0
    halve(tmp_path / "run" / "model")
    arguments = ("init_from=run/model", "peft=lora", "callbacks.export=true", "hydra.run.dir=lora")
    result = command("train", *GPT, *arguments)
    assert result.status == 0, result.err
    for checkpoint, out in (("lora", "merged"), ("lora/checkpoints/last.ckpt", "merged_too")):
        result = command("export", f"checkpoint={checkpoint}", "format=merged", f"out={out}")
        assert result.status == 0, result.err
        assert dtypes(tmp_path / out) == {torch.bfloat16}
    # rounded once: what fp32 weights with the adapter in them come to
    merged = load("merged").model.blocks[0].attention.q_proj.weight
    parts = load("lora").model.blocks[0].attention.q_proj
    with torch.no_grad():
        whole = parts(torch.eye(parts.in_features)) - (0 if parts.bias is None else parts.bias)
    torch.testing.assert_close(merged, whole.T.bfloat16().float(), rtol=1e-2, atol=1e-5)


def test_a_run_that_trains_bf16_weights_in_fp32_writes_fp32(command, tmp_path: Path) -> None:
    assert command("train", *GPT, "callbacks.export=true", "hydra.run.dir=run").status == 0
    halve(tmp_path / "run" / "model")
    assert command("train", *GPT, "init_from=run/model", "callbacks.export=true", "hydra.run.dir=next").status == 0
    assert dtypes(tmp_path / "next" / "model") == {torch.float32}


def test_new_tokens_that_the_embedding_has_room_for_come_with_an_adapter_too(command, tmp_path: Path) -> None:
    arguments = ("tokenizer=byte", "model.vocab_size=300", "callbacks.export=true", "hydra.run.dir=gpt")
    assert command("train", *GPT, *arguments).status == 0
    arguments = ("objective=fim", "init_from=gpt", "peft=lora", "peft.modules_to_save=[embed,lm_head]")
    result = command("train", *GPT, *arguments, "trainer.max_steps=4", "hydra.run.dir=run")
    assert result.status == 0, result.err
    gpt, base, adapted = load("gpt"), load("run/base"), load("run")
    n = len(gpt.tokenizer)
    assert len(adapted.tokenizer) == n + 3
    before, after = gpt.model.embed.weight, base.model.embed.weight
    assert len(after) == 300
    torch.testing.assert_close(after[n : n + 3], before[:n].mean(0).expand(3, -1))
    assert torch.equal(after[:n], before[:n])
    with torch.no_grad():
        ids = torch.arange(8)[None]
        assert (adapted.model(ids)[..., n : n + 3] - base.model(ids)[..., n : n + 3]).abs().max() > 1e-6


def adapter(folder: Path, base: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base, "peft_type": "LORA"}))
    return folder


def test_an_adapter_whose_base_is_itself_is_refused_in_one_line(tmp_path: Path) -> None:
    adapter(tmp_path / "a", str(tmp_path / "a"))
    with pytest.raises(CheckpointError, match="an adapter whose base is itself"):
        load(str(tmp_path / "a"))
    adapter(tmp_path / "a", str(tmp_path / "b"))
    adapter(tmp_path / "b", str(tmp_path / "a"))
    with pytest.raises(CheckpointError, match="an adapter whose base is itself"):
        load(str(tmp_path / "a"))


@pytest.mark.parametrize("value", [3, "x", [1], None])
@pytest.mark.parametrize("part", [MARK, "model", "tokenizer", "base", "peft", "state_dict"])
def test_a_checkpoint_with_marks_of_another_kind_is_refused_in_one_line(
    part: str, value: object, tmp_path: Path
) -> None:
    marks = {"format": 1, "rng": [], "model": {"n_layer": 1}, "tokenizer": {}, "base": None, "peft": None}
    contents = {"state_dict": {}, "global_step": 1, MARK: marks}
    (contents if part in contents else marks)[part] = value
    torch.save(contents, tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError) as caught:
        load(str(tmp_path / "last.ckpt"))
    assert "last.ckpt" in str(caught.value) or "checkpoint=x" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change", [{"n_layer": 10**12}, {"n_layer": 9999}, {"n_embd": 2.5}, {"n_embd": 10**12}, {"dropout": "x"}]
)
def test_a_checkpoint_of_absurd_sizes_is_refused_before_anything_is_built(
    change: dict, command, tmp_path: Path
) -> None:
    assert command("train", *GPT, "hydra.run.dir=run").status == 0
    file = (tmp_path / "run" / "checkpoints" / "last.ckpt").resolve()
    contents = torch.load(file, weights_only=True)
    contents[MARK]["model"] |= change
    torch.save(contents, tmp_path / "other.ckpt")
    with pytest.raises(CheckpointError, match=r"other\.ckpt: refused") as caught:
        load("other.ckpt")
    assert "\n" not in str(caught.value)
