"""LoRA as GGUF: the factors change the file's matrices by what merging adds to ours; other adapters are refused."""

import pytest
import torch

from genai_pl.errors import ConfigError
from genai_pl.models import ModelConfig, build_model
from genai_pl.models.gguf.architectures import architecture_of
from genai_pl.models.gguf.reader import GgufFile
from genai_pl.models.gguf.writer import write_lora_gguf
from genai_pl.peft import merge
from genai_pl.peft.bottleneck import bottleneck
from genai_pl.peft.io.gguf import gguf_factors
from genai_pl.peft.lora import LoRALinear, lora

GPT2 = {"n_layer": 2, "n_embd": 32, "n_head": 4, "vocab_size": 61, "max_seq_len": 32}
LLAMA = {**GPT2, "position": "rotary", "norm": "rmsnorm", "bias": False, "gated_mlp": True, "activation": "silu"}
MODELS = {"gpt2": GPT2, "llama": {**LLAMA, "n_kv_head": 2}}


def adapted(kind: str, **options: object) -> torch.nn.Module:
    torch.manual_seed(0)
    model = lora(
        build_model(ModelConfig(**MODELS[kind])), rank=3, target_modules=["q_proj", "v_proj", "up_proj"], **options
    )
    for module in model.modules():
        if isinstance(module, LoRALinear):
            torch.nn.init.normal_(module.lora_B)
    return model


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("init", ["default", "pissa"])
def test_factors_make_the_change_that_merging_makes(kind: str, init: str, tmp_path):
    pytest.importorskip("gguf", reason="GGUF files are written by the package gguf")
    model = adapted(kind, init=init, alpha=5.0)
    architecture = architecture_of(model.config)
    rows = list(architecture.table(model.config))
    write_lora_gguf(gguf_factors(model, rows), architecture, tmp_path / "a.gguf", name="a")
    file = GgufFile(tmp_path / "a.gguf")
    assert file.keys["adapter.type"] == "lora"
    torch.manual_seed(0)
    before = build_model(ModelConfig(**MODELS[kind])).state_dict()
    after = merge(model).state_dict()
    changed = 0
    for row in rows:
        joined = [torch.cat([state[name].detach() for name in row.names]) for state in (before, after)]
        change = row.to_hf(joined[1]) - row.to_hf(joined[0])
        if not change.any():
            assert f"{row.hf_name}.lora_a" not in file.tensors
            continue
        changed += 1
        A, B = (file.read(f"{row.hf_name}.{part}") for part in ("lora_a", "lora_b"))
        torch.testing.assert_close(B @ A, change, atol=1e-5, rtol=1e-4)
    assert changed == (4 if kind == "gpt2" else 6)


def test_adapters_that_llama_cpp_lacks_are_refused():
    plain = build_model(ModelConfig(**GPT2))
    table = list(architecture_of(plain.config).table(plain.config))
    with pytest.raises(ConfigError, match="writes one adapter, and this model has 0"):
        gguf_factors(plain, table)
    with pytest.raises(ConfigError, match=r"llama\.cpp has LoRA alone, and this adapter has DoRA; format=gguf merges"):
        gguf_factors(adapted("gpt2", dora=True), table)
    with pytest.raises(ConfigError, match="this adapter has Bottleneck"):
        gguf_factors(bottleneck(plain, size=4), table)
