"""Round trips: a folder of transformers that is read and written holds the same tensors, classes and token ids."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from sweep import BASES, MODELS, make
from test_against_transformers import TOKENS, edit
from torch import Tensor

from genai_pl.errors import CheckpointError
from genai_pl.models import ModelConfig, build_model, load_pretrained, save_pretrained
from genai_pl.models.resize import fill_vocabulary

IDS = torch.randint(3, 61, (1, 17), generator=torch.Generator().manual_seed(1))
NONE = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
UNTOUCHED = {"dtype", "transformers_version", "use_cache"}


def again(folder: Path, into: Path, **ids: int | None) -> Path:
    save_pretrained(load_pretrained(folder, dtype=None), into, token_ids={**NONE, **ids})
    return into


def numbers(cls: str, folder: Path) -> Tensor:
    """The logits that a class of transformers computes from the folder, of which no tensor may be missing."""
    options = {} if cls.startswith("XLNet") else {"attn_implementation": "eager"}
    model, info = getattr(transformers, cls).from_pretrained(folder, output_loading_info=True, **options)
    assert not info["missing_keys"], info
    extra_inputs = {"decoder_input_ids": IDS[:, :9]} if cls.startswith("T5") else {}
    with torch.no_grad():
        outputs = model.eval()(IDS, **extra_inputs)
    return outputs["logits"] if "logits" in outputs else outputs["last_hidden_state"]


@pytest.mark.parametrize("name", [name for name in MODELS if name != "bert_pretraining"])
def test_a_folder_that_is_read_and_written_gives_the_same_numbers_from_the_same_class(name: str, tmp_path: Path):
    make(name, tmp_path / "old")
    again(tmp_path / "old", tmp_path / "new")
    values = [json.loads((tmp_path / part / "config.json").read_text()) for part in ("old", "new")]
    assert values[1]["architectures"] == values[0]["architectures"]
    torch.testing.assert_close(numbers(MODELS[name][0], tmp_path / "new"), numbers(MODELS[name][0], tmp_path / "old"))
    kept = {key for key, value in values[0].items() if value is not None} - UNTOUCHED - {"eos_token_id"}
    lost = {key for key in kept & set(values[1]) if values[1][key] != values[0][key]}
    assert lost <= {"layer_types", "rope_parameters", "scale_decoder_outputs", "tie_word_embeddings"}


@pytest.mark.parametrize("name", ["bert_headless", "roberta_headless", "albert_headless", "bert_pretraining"])
def test_a_pooler_is_kept(name: str, tmp_path: Path):
    make(name, tmp_path / "old")
    again(tmp_path / "old", tmp_path / "new")
    theirs = [
        getattr(transformers, BASES[MODELS[name][1]]).from_pretrained(tmp_path / part).eval() for part in ("old", "new")
    ]
    with torch.no_grad():
        before, after = (model(IDS).pooler_output for model in theirs)
    torch.testing.assert_close(after, before)


def test_a_pooler_is_not_trained_and_stays_through_a_state_dictionary(tmp_path: Path):
    make("bert_headless", tmp_path)
    model = load_pretrained(tmp_path)
    assert "pooler.weight" in model.state_dict()
    assert not any("pooler" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("pad", [1, 3])
def test_roberta_counts_positions_from_its_pad_token_both_ways(pad: int, tmp_path: Path):
    make("roberta", tmp_path / "old")
    edit(tmp_path / "old" / "config.json", pad_token_id=pad)
    again(tmp_path / "old", tmp_path / "new", pad_token_id=pad)
    assert type(transformers.AutoConfig.from_pretrained(tmp_path / "new")).__name__ == "RobertaConfig"
    torch.testing.assert_close(
        numbers("RobertaForMaskedLM", tmp_path / "new"), numbers("RobertaForMaskedLM", tmp_path / "old")
    )


def test_a_pad_token_that_would_move_robertas_positions_is_not_written_over_them(tmp_path: Path):
    make("roberta", tmp_path / "old")
    again(tmp_path / "old", tmp_path / "new", pad_token_id=7)
    assert json.loads((tmp_path / "new" / "config.json").read_text())["model_type"] == "genai_pl"
    ours = [load_pretrained(tmp_path / part)(IDS) for part in ("old", "new")]
    assert torch.equal(*ours)


TIED = {
    "gpt2": "lm_head.weight", "llama_tied": "lm_head.weight", "qwen3": "lm_head.weight", "gemma3": "lm_head.weight",
    "bert": "cls.predictions.decoder.weight", "roberta": "lm_head.decoder.weight", "albert": "predictions.decoder.weight",
    "xlnet": "lm_loss.weight", "t5": "lm_head.weight",
}  # fmt: skip


@pytest.mark.parametrize(("name", "head"), TIED.items())
def test_a_head_of_its_own_is_used_and_written_although_config_json_ties_it(name: str, head: str, tmp_path: Path):
    make(name, tmp_path / "old")
    file = tmp_path / "old" / "model.safetensors"
    tensors = load_file(file)
    embedding = next(t for t in tensors.values() if t.shape[0] == 61 and t.dim() == 2)
    save_file({**tensors, head: embedding.flip(0).contiguous()}, file, metadata={"format": "pt"})
    expected = numbers(MODELS[name][0], tmp_path / "old")
    again(tmp_path / "old", tmp_path / "new")
    assert json.loads((tmp_path / "new" / "config.json").read_text())["tie_word_embeddings"] is False
    torch.testing.assert_close(numbers(MODELS[name][0], tmp_path / "new"), expected)


@pytest.mark.parametrize("name", ["bert", "roberta", "albert"])
def test_a_bias_of_the_decoder_alone_is_used(name: str, tmp_path: Path):
    make(name, tmp_path)
    file, bias = tmp_path / "model.safetensors", TIED[name].replace("weight", "bias")
    save_file({**load_file(file), bias: torch.linspace(-1, 1, 61)}, file, metadata={"format": "pt"})
    torch.testing.assert_close(load_pretrained(tmp_path)(IDS), numbers(MODELS[name][0], tmp_path))


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3"])
def test_a_decoder_that_attends_both_ways_is_read_and_written_as_one(name: str, tmp_path: Path):
    make(name, tmp_path / "old")
    edit(tmp_path / "old" / "config.json", is_causal=False)
    expected = numbers(MODELS[name][0], tmp_path / "old")
    torch.testing.assert_close(load_pretrained(tmp_path / "old")(IDS), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(numbers(MODELS[name][0], again(tmp_path / "old", tmp_path / "new")), expected)


def test_what_t5_begins_to_write_with_is_read_and_written(tmp_path: Path):
    make("t5", tmp_path / "old")
    edit(tmp_path / "old" / "config.json", decoder_start_token_id=5)
    edit(tmp_path / "old" / "generation_config.json", decoder_start_token_id=5)
    assert load_pretrained(tmp_path / "old").config.start_token(0) == 5
    again(tmp_path / "old", tmp_path / "new", pad_token_id=0, eos_token_id=1)
    model = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "new")
    assert model.generate(IDS, max_new_tokens=2, use_cache=False)[0, 0] == 5


def test_it_is_found_in_generation_config_json_alone(tmp_path: Path):
    make("t5", tmp_path)
    edit(tmp_path / "config.json", decoder_start_token_id=...)
    edit(tmp_path / "generation_config.json", decoder_start_token_id=9)
    assert load_pretrained(tmp_path).config.start_token(0) == 9
    edit(tmp_path / "config.json", decoder_start_token_id=3)
    with pytest.raises(CheckpointError, match=r"decoder_start_token_id=9, and config\.json says 3"):
        load_pretrained(tmp_path)


def test_t5_of_ones_own_begins_with_its_pad_token_in_transformers_too(tmp_path: Path):
    config = ModelConfig(
        shape="encoder_decoder", position="relative", norm="rmsnorm", bias=False, attention_scale=1.0, scale_head=True,
        n_layer=1, n_head=2, n_embd=16, vocab_size=61, activation="relu",
    )  # fmt: skip
    save_pretrained(build_model(config), tmp_path, token_ids={"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1})
    model = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path)
    assert (model.config.decoder_start_token_id, model.generation_config.decoder_start_token_id) == (1, 1)


@pytest.mark.parametrize("name", ["bert_untied", "gpt2_score", "llama"])
def test_a_folder_in_bf16_is_written_in_bf16(name: str, tmp_path: Path):
    make(name, tmp_path / "old")
    file = tmp_path / "old" / "model.safetensors"
    save_file({key: x.bfloat16() for key, x in load_file(file).items()}, file, metadata={"format": "pt"})
    again(tmp_path / "old", tmp_path / "new")
    assert {x.dtype for x in load_file(tmp_path / "new" / "model.safetensors").values()} == {torch.bfloat16}


def test_labels_dropouts_and_ids_of_a_folder_are_written_again(tmp_path: Path):
    make("gpt2_score", tmp_path / "old")
    keys = {"id2label": {"0": "good"}, "label2id": {"good": 0}, "attn_pdrop": 0.2, "bos_token_id": 7, "pad_token_id": 5}
    edit(tmp_path / "old" / "config.json", **keys, task_specific_params={"x": 1})
    again(tmp_path / "old", tmp_path / "new")
    new = json.loads((tmp_path / "new" / "config.json").read_text())
    assert {key: new[key] for key in keys} == keys
    assert new["task_specific_params"] == {"x": 1}


def test_tensors_that_have_no_place_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    make("bert_pretraining", tmp_path)
    load_pretrained(tmp_path)
    assert "2 tensors have no place in this model and are left out: cls.seq_relationship" in caplog.text


@pytest.mark.parametrize("size", [10**12, 2**31 - 1, 2.5, "2", True, -1])
@pytest.mark.parametrize("key", ["num_hidden_layers", "hidden_size", "vocab_size", "intermediate_size"])
def test_an_absurd_size_is_refused_before_anything_is_built(key: str, size: object, tmp_path: Path):
    make("llama", tmp_path)
    edit(tmp_path / "config.json", **{key: size})
    with pytest.raises(CheckpointError) as caught:
        load_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("weight_map", [[], 3, {"a": 1}, "x"])
def test_an_index_of_another_kind_is_refused(weight_map: object, tmp_path: Path):
    make("llama", tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=r"weight_map|is missing"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("tied", [True, False])
def test_tokens_for_which_there_is_room_begin_as_the_mean_of_those_before(tied: bool):
    model = build_model(ModelConfig(n_layer=1, n_head=2, n_embd=16, vocab_size=61, max_seq_len=8, tie_embeddings=tied))
    before = model.embed.weight.detach().clone()
    fill_vocabulary(model, 50, 53)
    torch.testing.assert_close(model.embed.weight[50:53], before[:50].mean(0).expand(3, -1))
    assert torch.equal(model.embed.weight[:50], before[:50])
    assert torch.equal(model.embed.weight[53:], before[53:])
    assert (model.lm_head.weight is model.embed.weight) == tied


def test_token_ids_of_a_tokenizer_beat_those_of_the_folder(tmp_path: Path):
    make("llama", tmp_path / "old")
    again(tmp_path / "old", tmp_path / "new", **{**TOKENS, "pad_token_id": 9})
    assert json.loads((tmp_path / "new" / "config.json").read_text())["pad_token_id"] == 9


def test_one_file_of_weights_comes_before_an_index_of_others(tmp_path: Path) -> None:
    """transformers reads model.safetensors where both are there."""
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16, "vocab_size": 32}
    first, second = (transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)) for _ in range(2))
    first.save_pretrained(tmp_path, max_shard_size="4KB")
    second.save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").rename(tmp_path / "model.safetensors")
    tokens = torch.arange(8)[None]
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()(tokens).logits
    torch.testing.assert_close(load_pretrained(tmp_path)(tokens), theirs, atol=1e-5, rtol=1e-5)
