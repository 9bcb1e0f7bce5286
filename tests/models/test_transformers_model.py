"""Models of transformers give the same logits with our attention as with their own."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_against_transformers import shaken
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from genai_pl.data import byte_tokenizer
from genai_pl.errors import CheckpointError, ConfigError
from genai_pl.loading import load
from genai_pl.models import load_pretrained
from genai_pl.models.hf.transformers_model import build_wrapped, load_wrapped, save_wrapped

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "vocab_size": 61,
    "max_position_embeddings": 24,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
KINDS = {
    "olmo2": {},
    "phi3": {"sliding_window": 5},
    "gpt_neox": {},
    "opt": {"ffn_dim": 40, "word_embed_proj_dim": 32},
    "gemma2": {"head_dim": 16, "sliding_window": 5},
    "olmo3": {"sliding_window": 5},
}


def folder_of(kind: str, folder: Path, **values: object) -> torch.nn.Module:
    theirs = shaken(AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, **values})))
    theirs.save_pretrained(folder)
    return theirs


@pytest.fixture
def input_ids() -> Tensor:
    return torch.randint(3, 61, (2, 17), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_logits_are_theirs_alone_packed_and_with_a_cache(kind: str, tmp_path: Path, input_ids: Tensor):
    theirs = folder_of(kind, tmp_path, **KINDS[kind])
    ours = load_wrapped(str(tmp_path))
    whole = theirs(input_ids).logits
    torch.testing.assert_close(ours(input_ids), whole, rtol=0, atol=1e-4)
    segments = torch.tensor([[1] * 6 + [2] * 11]).expand(2, 17)
    alone = torch.cat([theirs(input_ids[:, :6]).logits, theirs(input_ids[:, 6:]).logits], dim=1)
    torch.testing.assert_close(ours(input_ids, segments), alone, rtol=0, atol=1e-4)
    cache = ours.new_cache(2, 24)
    parts = [ours(part, cache=cache) for part in input_ids.split([9, 1, 1, 1, 1, 4], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-4)


def test_a_wrapped_model_comes_back_from_its_folder_and_its_configuration(tmp_path: Path, input_ids: Tensor):
    folder_of("olmo2", tmp_path / "theirs")
    ours = load_wrapped(str(tmp_path / "theirs"))
    assert save_wrapped(ours, tmp_path / "ours") == "Olmo2ForCausalLM"
    torch.testing.assert_close(load_wrapped(str(tmp_path / "ours"))(input_ids), ours(input_ids))
    again = build_wrapped(ours.config.to_dict()["wrapped"])
    again.load_state_dict(ours.state_dict())
    torch.testing.assert_close(again.eval()(input_ids), ours(input_ids))


def test_what_is_no_family_of_ours_is_wrapped_only_where_that_is_wanted(tmp_path: Path):
    folder_of("olmo2", tmp_path)
    with pytest.raises(
        CheckpointError, match=r"'olmo2' is not supported; supported: gpt2, llama.*model=hf model.name="
    ):
        load(str(tmp_path), wrap=False)


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        ("bert", {}, "its head does more than one product"),
        ("llama", {"is_causal": False}, "its tokens see those that come later"),
    ],
)
def test_an_architecture_that_cannot_is_refused_in_one_line(kind: str, values: dict, message: str, tmp_path: Path):
    folder_of(kind, tmp_path, **values)
    with pytest.raises(ConfigError, match=message):
        load_wrapped(str(tmp_path))


LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 258,
}


def test_what_our_own_models_refuse_in_a_family_of_ours_is_run_by_transformers(tmp_path: Path) -> None:
    theirs = LlamaForCausalLM(LlamaConfig(**LLAMA, mlp_bias=True)).eval()
    theirs.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="mlp_bias=True is not supported"):
        load_pretrained(tmp_path)
    tokens = torch.arange(8)[None]
    torch.testing.assert_close(load(str(tmp_path)).model(tokens), theirs(tokens).logits, atol=1e-5, rtol=1e-5)


def test_transformers_draws_no_weights_that_a_folder_lacks(tmp_path: Path) -> None:
    LlamaForCausalLM(LlamaConfig(**LLAMA)).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"tensor model.layers.0.mlp.up_proj.weight is missing"):
        load_wrapped(str(tmp_path))
