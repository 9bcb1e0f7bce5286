"""An adapter folder that cannot be read is one line that names it."""

import json
from pathlib import Path

import pytest
import torch
from peft_models import build
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from genai_pl.errors import CheckpointError
from genai_pl.peft import load_adapter, lora, save_adapter

BROKEN = {
    "peft_type=LOHA is not supported; supported: LORA": {"peft_type": "LOHA"},
    "bias='all' is not supported": {"bias": "all"},
    "init_lora_weights='pissa' changes the base": {"init_lora_weights": "pissa"},
    "r=None is not a number": {"r": None},
    "layer_replication=[[0, 2]] is not supported": {"layer_replication": [[0, 2]]},
}


@pytest.mark.parametrize("message", BROKEN)
def test_what_a_configuration_asks_for_in_vain_is_one_line(message: str, tmp_path: Path):
    save_adapter(lora(build("llama")), tmp_path, base="base")
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | BROKEN[message]))
    with pytest.raises(CheckpointError) as raised:
        load_adapter(build("llama"), tmp_path)
    assert str(raised.value).startswith(f"{tmp_path}: {message}")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("ours", [True, False])
def test_tensors_that_do_not_fit_are_one_line(ours: bool, tmp_path: Path):
    save_adapter(lora(build("llama")), tmp_path, base="base")
    file = tmp_path / "adapter_model.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata() if ours else {}
    tensors = load_file(file)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    changed = {
        f"tensor {name} is missing": {k: v for k, v in tensors.items() if k != name},
        "lora_B.weight of model.layers.0.self_attn.v_proj has shape|has 16 outputs here, in the file 17": {
            **tensors, name.replace("q_proj", "v_proj"): torch.zeros(17, 8)
        },
        f"adapter_model.safetensors has numbers that are not finite, in {name}": {
            **tensors, name: torch.full_like(tensors[name], float("nan"))
        },
        "tensor base_model.model.score.weight fits no layer of this model": {
            **tensors, "base_model.model.score.weight": torch.zeros(2, 32)
        },
        "tensor base_model.model.embed.lora_embedding_A fits no layer of this model": {
            "base_model.model.embed.lora_embedding_A": torch.zeros(2, 32)
        },
    }  # fmt: skip
    for message, wrong in changed.items():
        save_file(wrong, file, metadata=metadata)
        with pytest.raises(CheckpointError, match=f"^{tmp_path}: .*({message})"):
            load_adapter(build("llama"), tmp_path)
    file.write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"adapter_model.safetensors cannot be read"):
        load_adapter(build("llama"), tmp_path)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"no adapter_model.safetensors in it"):
        load_adapter(build("llama"), tmp_path)
    with pytest.raises(CheckpointError, match=r"no adapter_config.json in it"):
        load_adapter(build("llama"), tmp_path / "nowhere")


def test_an_adapter_of_another_model_is_refused(tmp_path: Path):
    save_adapter(lora(build("llama")), tmp_path, base="base")
    with pytest.raises(CheckpointError, match="fits no layer of this model"):
        load_adapter(build("gpt2"), tmp_path)
