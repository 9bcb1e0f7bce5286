"""Encoders and encoder-decoders give the numbers of transformers, from the same folder, in both directions."""

import json
from pathlib import Path

import pytest
import torch
from test_against_transformers import TOKENS, edit, shaken
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from genai_pl.models import ModelConfig, build_model, load_pretrained, save_pretrained

BERT = {
    "model_type": "bert",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "vocab_size": 61,
    "max_position_embeddings": 24,
}
MASKED = {
    "bert": BERT,
    "bert_untied": {**BERT, "tie_word_embeddings": False},
    "roberta": {**BERT, "model_type": "roberta", "type_vocab_size": 1, "pad_token_id": 1},
    "albert": {**BERT, "model_type": "albert", "embedding_size": 16},
    "albert_gelu": {**BERT, "model_type": "albert", "embedding_size": 48, "hidden_act": "gelu"},
}
T5 = {
    "model_type": "t5",
    "d_model": 32,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 4,
    "d_kv": 6,
    "d_ff": 40,
    "vocab_size": 61,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
}
SEQ2SEQ = {
    "t5": T5,
    "flan_t5": {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
}
XLNET = {"model_type": "xlnet", "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 40, "vocab_size": 61}
SIZES = {"n_layer": 2, "n_head": 4, "n_embd": 32, "vocab_size": 61, "max_seq_len": 24}
ENCODER = {**SIZES, "shape": "encoder", "norm_order": "post", "embed_norm": True, "n_token_types": 2}
OURS = {
    "BertForMaskedLM": {**ENCODER, "activation": "gelu", "head": "transform", "head_bias": True},
    "BertModel": {**ENCODER, "head": "none"},
    "AlbertForMaskedLM": {
        **ENCODER, "head": "transform", "head_bias": True, "share_layers": True, "embedding_size": 16
    },
    "T5ForConditionalGeneration": {
        **SIZES, "shape": "encoder_decoder", "position": "relative", "norm": "rmsnorm", "bias": False,
        "activation": "relu", "attention_scale": 1.0, "scale_head": True,
    },
    "XLNetLMHeadModel": {
        **SIZES, "shape": "encoder", "position": "xl", "norm_order": "post", "qkv_bias": False, "o_bias": False,
        "head_bias": True,
    },
}  # fmt: skip


def build_theirs(auto: type, values: dict) -> nn.Module:
    values = dict(values)
    return shaken(auto.from_config(AutoConfig.for_model(values.pop("model_type"), **values)))


@pytest.fixture
def input_ids() -> Tensor:
    return torch.randint(3, 61, (2, 17), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def padded() -> Tensor:
    mask = torch.ones(2, 17, dtype=torch.long)
    mask[1, 11:] = 0
    return mask


def assert_equal(ours: Tensor, theirs: Tensor, limit: float = 2e-5) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=limit)


@pytest.mark.parametrize("values", MASKED.values(), ids=MASKED)
def test_masked_language_models_give_the_logits_of_transformers(
    values: dict, tmp_path: Path, input_ids: Tensor, padded: Tensor
):
    theirs = build_theirs(AutoModelForMaskedLM, values)
    theirs.save_pretrained(tmp_path)
    ours = load_pretrained(tmp_path)
    types = (torch.arange(17) > 7).long().expand(2, 17) * (values.get("type_vocab_size", 2) - 1)
    expected = theirs(input_ids, attention_mask=padded, token_type_ids=types).logits
    assert_equal(ours(input_ids, padded, token_type_ids=types)[padded > 0], expected[padded > 0])
    assert_equal(ours(input_ids), theirs(input_ids).logits)


@pytest.mark.parametrize("kind", ["bert", "roberta", "albert", "xlnet"])
def test_a_model_without_head_gives_the_hidden_states_of_transformers(kind: str, tmp_path: Path, input_ids: Tensor):
    theirs = build_theirs(AutoModel, XLNET if kind == "xlnet" else MASKED[kind])
    theirs.save_pretrained(tmp_path)
    ours = load_pretrained(tmp_path)
    assert_equal(ours.features(input_ids), theirs(input_ids).last_hidden_state)
    assert ours.lm_head is None
    save_pretrained(ours, tmp_path / "again", token_ids=TOKENS)
    again = AutoModel.from_pretrained(tmp_path / "again")
    assert type(again).__name__ == type(theirs).__name__
    assert_equal(again(input_ids).last_hidden_state, ours.features(input_ids))


def test_gamma_and_beta_of_old_files_are_the_weight_and_bias_of_a_norm(tmp_path: Path, input_ids: Tensor):
    from safetensors.torch import load_file, save_file

    theirs = build_theirs(AutoModelForMaskedLM, BERT)
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    tensors = load_file(file)
    for new, name in old.items():
        tensors = {key.replace(new, name): value for key, value in tensors.items()}
    save_file(tensors, file)
    assert_equal(load_pretrained(tmp_path)(input_ids), theirs(input_ids).logits)


@pytest.mark.parametrize("values", SEQ2SEQ.values(), ids=SEQ2SEQ)
def test_t5_gives_the_logits_of_transformers(values: dict, tmp_path: Path, input_ids: Tensor, padded: Tensor):
    theirs = build_theirs(AutoModelForSeq2SeqLM, values)
    theirs.save_pretrained(tmp_path)
    ours, target = load_pretrained(tmp_path), input_ids[:, :9].flip(0)
    expected = theirs(input_ids, attention_mask=padded, decoder_input_ids=target).logits
    assert_equal(ours(input_ids, padded, decoder_input_ids=target), expected, 5e-5)


def test_t5_1_1_is_read_as_older_transformers_wrote_it(tmp_path: Path, input_ids: Tensor):
    theirs = build_theirs(AutoModelForSeq2SeqLM, SEQ2SEQ["flan_t5"])
    theirs.save_pretrained(tmp_path)
    before = load_pretrained(tmp_path)(input_ids, decoder_input_ids=input_ids)
    edit(tmp_path / "config.json", scale_decoder_outputs=..., tie_word_embeddings=False)
    assert_equal(load_pretrained(tmp_path)(input_ids, decoder_input_ids=input_ids), before)


def test_the_two_streams_are_those_of_transformers_xlnet(tmp_path: Path, input_ids: Tensor):
    theirs = build_theirs(AutoModelForCausalLM, XLNET)
    theirs.save_pretrained(tmp_path)
    ours = load_pretrained(tmp_path)
    types = (torch.arange(17) > 7).long().expand(2, 17)
    assert_equal(ours(input_ids), theirs(input_ids).logits)
    assert_equal(ours(input_ids, token_type_ids=types), theirs(input_ids, token_type_ids=types).logits)
    order = torch.stack([torch.randperm(17, generator=torch.Generator().manual_seed(s)) for s in (1, 2)])
    order = (order - 11).clamp(min=0)  # twelve tokens of context, five targets in a drawn order
    targets = torch.stack([(row > 0).nonzero().squeeze(1) for row in order])  # (2, 5)
    hidden = (order[:, None, :] >= order[:, :, None]).float()  # theirs: 1 where i does not attend to j
    hidden[(order[:, None, :] == 0) & (order[:, :, None] == 0)] = 0.0  # the context sees itself
    mapping = torch.nn.functional.one_hot(targets, 17).float()
    expected = theirs(input_ids, perm_mask=hidden, target_mapping=mapping).logits
    assert_equal(ours.logits(ours.permuted_features(input_ids, order, targets)), expected)


@pytest.mark.parametrize(("architecture", "values"), OURS.items(), ids=OURS)
def test_transformers_gives_the_numbers_of_exported_models(
    architecture: str, values: dict, tmp_path: Path, input_ids: Tensor
):
    import transformers

    ours = shaken(build_model(ModelConfig(**values)))
    assert save_pretrained(ours, tmp_path, token_ids={**TOKENS, "pad_token_id": 0}) == architecture
    theirs, info = getattr(transformers, architecture).from_pretrained(tmp_path, output_loading_info=True)
    allowed = {"pooler.dense.weight", "pooler.dense.bias"} if architecture == "BertModel" else set()
    assert set(info["missing_keys"]) == allowed, info
    assert not info["unexpected_keys"], info
    extra_inputs = {"decoder_input_ids": input_ids[:, :5]} if architecture.startswith("T5") else {}
    if architecture == "BertModel":
        assert_equal(theirs(input_ids).last_hidden_state, ours.features(input_ids))
    else:
        assert_equal(theirs(input_ids, **extra_inputs).logits, ours(input_ids, **extra_inputs), 5e-5)
    again = load_pretrained(tmp_path)
    assert torch.equal(again.features(input_ids, **extra_inputs), ours.features(input_ids, **extra_inputs))


def test_a_flan_export_keeps_its_own_head(tmp_path: Path, input_ids: Tensor):
    values = {**OURS["T5ForConditionalGeneration"], "tie_embeddings": False, "scale_head": False}
    ours = shaken(build_model(ModelConfig(**values, gated_mlp=True)))
    save_pretrained(ours, tmp_path, token_ids=TOKENS)
    theirs = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert_equal(
        theirs(input_ids, decoder_input_ids=input_ids).logits, ours(input_ids, decoder_input_ids=input_ids), 5e-5
    )


@pytest.mark.parametrize("shape", ["encoder", "encoder_decoder"])
def test_what_no_family_expresses_makes_a_round_trip(shape: str, tmp_path: Path, input_ids: Tensor):
    values = {**SIZES, "shape": shape, "position": "sinusoidal", "norm_order": "post", "activation": "relu"}
    ours = shaken(build_model(ModelConfig(**values, scale_embeddings=True)))
    assert save_pretrained(ours, tmp_path, token_ids=TOKENS) == "genai_pl"
    extra_inputs = {"decoder_input_ids": input_ids} if shape == "encoder_decoder" else {}
    assert torch.equal(load_pretrained(tmp_path)(input_ids, **extra_inputs), ours(input_ids, **extra_inputs))


def test_the_features_of_a_performer_are_kept(tmp_path: Path, input_ids: Tensor):
    ours = shaken(build_model(ModelConfig(**SIZES, attention_kind="performer", performer_features=16)))
    ours.blocks[0].attention.attend.redraw(torch.Generator().manual_seed(5))
    save_pretrained(ours, tmp_path, token_ids=TOKENS)
    assert torch.equal(load_pretrained(tmp_path)(input_ids), ours(input_ids))


def test_large_models_are_written_in_shards_that_transformers_reads(tmp_path: Path, input_ids: Tensor):
    ours = shaken(build_model(ModelConfig(**OURS["BertForMaskedLM"])))
    save_pretrained(ours, tmp_path, token_ids=TOKENS, max_shard_bytes=20_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 2
    assert files == {path.name for path in tmp_path.glob("*.safetensors")}
    assert_equal(AutoModelForMaskedLM.from_pretrained(tmp_path)(input_ids).logits, ours(input_ids))
    assert torch.equal(load_pretrained(tmp_path)(input_ids), ours(input_ids))
