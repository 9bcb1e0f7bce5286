"""Helpers for virtual tokens in PEFT's folders, in both directions, on small transformers models."""

import json
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from peft_models import shaken
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from genai_pl.models import load_pretrained, load_wrapped
from genai_pl.peft import adapters_of
from genai_pl.peft.io.tensors import AdapterFile

LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 24,
    "vocab_size": 61,
}
T5 = {"model_type": "t5", "d_model": 32, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 4, "vocab_size": 61}
THEIRS = {
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 24, "vocab_size": 61},
    "llama": LLAMA,
    "qwen3": {**LLAMA, "model_type": "qwen3"},
    "olmo2": {**LLAMA, "model_type": "olmo2", "pad_token_id": 0},
    "gemma3": {**LLAMA, "model_type": "gemma3_text", "pad_token_id": 0, "sliding_window": 40},
    "bert": {k: v for k, v in LLAMA.items() if k not in ("num_key_value_heads", "head_dim")} | {"model_type": "bert"},
    "t5": {**T5, "decoder_start_token_id": 0, "pad_token_id": 0},
    "t5_three_layers": {**T5, "num_layers": 3, "decoder_start_token_id": 0, "pad_token_id": 0},
}
TASKS = {"bert": "FEATURE_EXTRACTION", "t5": "SEQ_2_SEQ_LM", "t5_three_layers": "SEQ_2_SEQ_LM"}
CLASSES = {"bert": AutoModelForMaskedLM, "t5": AutoModelForSeq2SeqLM, "t5_three_layers": AutoModelForSeq2SeqLM}


def both(kind: str, folder: Path) -> tuple[nn.Module, nn.Module]:
    """A transformers model, and a genai_pl model with its weights."""
    values = dict(THEIRS[kind])
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    theirs = shaken(CLASSES.get(kind, AutoModelForCausalLM).from_config(config))
    theirs.save_pretrained(folder / "base")
    if kind == "olmo2":  # no family of ours
        return theirs, load_wrapped(str(folder / "base"))
    return theirs, load_pretrained(folder / "base")


def read_by_ours(theirs: nn.Module, ours: nn.Module, write, folder: Path) -> nn.Module:
    """The transformers model with the adapter that the genai_pl model has."""
    contents = write(ours, adapters_of(ours)[0])
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(contents.config))
    save_file(
        {name: x.detach().clone().contiguous() for name, x in contents.tensors.items()},
        folder / "adapter_model.safetensors",
    )
    return PeftModel.from_pretrained(theirs, folder).eval()


def made_by_peft(theirs: nn.Module, config, folder: Path) -> tuple[nn.Module, AdapterFile]:
    """The transformers model with an adapter of PEFT, and the files that PEFT saved."""
    model = shaken(get_peft_model(theirs, config), of="trained", std=0.5)
    model.save_pretrained(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    return model, AdapterFile(config, load_file(folder / "adapter_model.safetensors"))


def their_logits(kind: str, model: nn.Module, ids: Tensor, **inputs: Tensor) -> Tensor:
    """Logits (B, T, V) of a model of transformers, without those at virtual tokens."""
    if kind.startswith("t5"):
        return model(input_ids=ids.flip(1), decoder_input_ids=ids).logits
    return model(input_ids=ids, **inputs).logits[:, -ids.shape[1] :]


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    assert (ours - theirs).abs().max() <= 1e-5 * max(1.0, theirs.abs().max().item())


def assert_padded_rows_are_the_same(kind: str, ours: nn.Module, theirs: nn.Module, ids: Tensor) -> None:
    """PEFT puts virtual tokens before the padding, and counts positions through it: only ratios of distances agree."""
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    assert_same(ours(ids, mask)[1], their_logits(kind, theirs, ids, attention_mask=mask)[1])
