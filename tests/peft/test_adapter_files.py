"""Adapter folders give the same logits in PEFT and here, in both directions."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft_models import KINDS, build, frozen, logits_of, shaken, theirs_of, tokens, train
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

from genai_pl.config.enums import Head
from genai_pl.errors import ConfigError
from genai_pl.models import save_pretrained
from genai_pl.peft import adapters_disabled, adapters_of, bitfit, bottleneck, ia3, load_adapter, lora, save_adapter
from tests.conftest import some

peft = pytest.importorskip("peft")
pytestmark = [pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*")]

TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
AUTO = {"bert": AutoModelForMaskedLM, "albert": AutoModelForMaskedLM, "t5": AutoModelForSeq2SeqLM}
THEIRS = ("gpt2", "llama", "qwen3", "gemma3", "bert", "roberta", "albert", "t5", "wrapped")
LINEAR = {
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "bert": ["query", "value", "dense"],
    "roberta": ["query", "value", "intermediate.dense"],
    "albert": ["query", "value", "ffn"],
    "t5": ["q", "v", "wi", "wo"],
}
HEADS = {"bert": "cls.predictions.decoder", "roberta": "lm_head.decoder", "albert": "predictions.decoder"}


def theirs_like(model: nn.Module, kind: str, folder: Path) -> nn.Module:
    """A transformers model with the same weights."""
    if kind == "wrapped":
        return theirs_of(model)
    save_pretrained(model, folder, token_ids=TOKENS)
    return AUTO.get(kind, AutoModelForCausalLM).from_pretrained(folder).eval()


def theirs_say(theirs: nn.Module) -> Tensor:
    with torch.no_grad():
        arguments = {"input_ids": tokens()}
        if theirs.config.is_encoder_decoder:
            arguments = {"input_ids": tokens().flip(1), "decoder_input_ids": tokens()}
        return theirs(**arguments).logits


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


METHODS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "lora": lambda model: lora(model, rank=3, alpha=5.0),
    "all_linear": lambda model: lora(model, target_modules="all-linear", rslora=True),
    "some_of_joined": lambda model: lora(model, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 3}),
    "alphas": lambda model: lora(model, alpha_pattern={"k_proj": 3.0, "o_proj": 2.5}, rank=4),
    "pissa": lambda model: lora(model, init="pissa", rank=3, rslora=True, alpha_pattern={"k_proj": 3.0}),
    "dora": lambda model: lora(model, dora=True, target_modules=["q_proj", "v_proj", "down_proj"]),
    "ia3": ia3,
    "ia3_of_v": lambda model: ia3(model, target_modules=["v_proj"]),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", some(THEIRS))
def test_peft_loads_our_folder_with_our_logits(kind: str, method: str, tmp_path: Path):
    base = build(kind)
    theirs = theirs_like(base, kind, tmp_path / "base")
    close(logits_of(base), theirs_say(theirs))
    model = METHODS[method](base)
    ours = logits_of(shaken(model, of="trained", std=0.1))
    save_adapter(model, tmp_path / "adapter", base=str(tmp_path / "base"))
    close(theirs_say(peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter")), ours)
    again = load_adapter(build(kind), tmp_path / "adapter")
    close(logits_of(again), ours)
    save_adapter(again, tmp_path / "again", base=str(tmp_path / "base"))
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "again"))
    assert first.keys() == second.keys()
    assert all(first[name].shape == second[name].shape for name in first)


SAVED = {
    "gpt2": ["embed", "lm_head", "norm1"],
    "llama": ["lm_head", "norm"],
    "gemma3": ["embed", "norm", "q_norm"],
    "bert": ["lm_head", "embed_norm"],
    "roberta": ["position", "dense"],
    "t5": ["embed", "lm_head", "norm_cross"],
    "wrapped": ["embed_tokens", "lm_head"],
}


@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True")
@pytest.mark.parametrize("kind", SAVED)
def test_layers_trained_whole_are_in_the_folder(kind: str, tmp_path: Path):
    base = build(kind)
    theirs = theirs_like(base, kind, tmp_path / "base")
    model = lora(base, target_modules=["v_proj"], modules_to_save=SAVED[kind])
    train(model)
    ours = logits_of(model.eval())
    save_adapter(model, tmp_path / "adapter", base=str(tmp_path / "base"))
    close(theirs_say(peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter")), ours)
    assert torch.equal(logits_of(load_adapter(build(kind), tmp_path / "adapter")), ours)


@pytest.mark.parametrize("method", [lora, ia3])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_head_of_a_reward_model_goes_with_its_adapter(kind: str, method: Callable, tmp_path: Path):
    base = build(kind)
    base.set_head(Head.score)
    save_pretrained(base, tmp_path / "base", token_ids=TOKENS | {"pad_token_id": 0})
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base").eval()
    model = shaken(method(base), of="trained", std=0.1)
    save_adapter(model, tmp_path / "adapter", base=str(tmp_path / "base"))
    again = build(kind)
    again.set_head(Head.score)
    with torch.no_grad():
        ours = model.score(model.features(tokens())[:, -1])
        close(peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter")(input_ids=tokens()).logits, ours)
        close(load_adapter(again, tmp_path / "adapter").score(again.features(tokens())[:, -1]), ours)


def randomised(theirs: nn.Module, config: object) -> nn.Module:
    """PEFT's model around a transformers model, with random values in the trained parameters."""
    return shaken(peft.get_peft_model(theirs, config), of="trained", std=0.1)


CONFIGS = {
    "lora": lambda names: peft.LoraConfig(r=3, lora_alpha=5, target_modules=names),
    "rslora": lambda names: peft.LoraConfig(
        r=3, target_modules=names, use_rslora=True, rank_pattern={names[0]: 2}, alpha_pattern={f"0.*{names[1]}": 7}
    ),
    "all": lambda names: peft.LoraConfig(
        r=3, target_modules="all-linear", exclude_modules=".*(pooler|lm_head|cls|pred).*"
    ),
    "dora": lambda names: peft.LoraConfig(r=3, target_modules=names, use_dora=True),
    "ia3": lambda names: peft.IA3Config(target_modules=names, feedforward_modules=names[-1:]),
}


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False but the target module is `Conv1D`")
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("kind", THEIRS)
def test_what_peft_has_written_gives_its_logits_here(kind: str, config: str, tmp_path: Path):
    base = build(kind)
    names = LINEAR.get(kind, ["q_proj", "v_proj", "down_proj"])
    theirs = randomised(theirs_like(base, kind, tmp_path / "base"), CONFIGS[config](names))
    theirs.save_pretrained(tmp_path / "adapter")
    before = logits_of(base)
    model = load_adapter(base, tmp_path / "adapter")
    close(logits_of(model), theirs_say(theirs))
    with adapters_disabled(model):
        assert torch.equal(logits_of(model), before)
    train(model)  # what is read can be trained on


@pytest.mark.filterwarnings(
    "ignore:fan_in_fan_out is set to False but the target module is `Conv1D`",
    "ignore:Model has .tie_word_embeddings=True",
)
@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])
def test_layers_that_peft_has_trained_whole_are_read(kind: str, tmp_path: Path):
    base = build(kind)
    names = LINEAR.get(kind, ["q_proj", "v_proj"])
    saved = [HEADS.get(kind, "lm_head"), *(["wte"] if kind == "gpt2" else [])]  # tied here, apart there
    config = peft.LoraConfig(target_modules=names[:2], modules_to_save=saved)
    theirs = randomised(theirs_like(base, kind, tmp_path / "base"), config)
    theirs.save_pretrained(tmp_path / "adapter")
    close(logits_of(load_adapter(base, tmp_path / "adapter")), theirs_say(theirs))


def test_a_model_without_head_reads_what_was_trained_with_one(tmp_path: Path):
    base = build("bert")
    model = shaken(lora(base), of="trained")
    with torch.no_grad():
        ours = model.features(tokens())
    save_adapter(model, tmp_path / "adapter", base="base")
    save_pretrained(build("bert"), tmp_path / "base", token_ids=TOKENS)
    headless = build("bert")
    headless.set_head(Head.none)
    with torch.no_grad():
        close(load_adapter(headless, tmp_path / "adapter").features(tokens()), ours)
    theirs = AutoModel.from_pretrained(tmp_path / "base", add_pooling_layer=False).eval()
    save_adapter(headless, tmp_path / "headless", base="base")
    with torch.no_grad():
        adapted = peft.PeftModel.from_pretrained(theirs, tmp_path / "headless")
        close(adapted(input_ids=tokens()).last_hidden_state, ours)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", [lora, ia3, bottleneck, bitfit])
def test_every_adapter_comes_back_and_can_be_trained_on(kind: str, method: Callable, tmp_path: Path):
    try:
        model = method(build(kind))
    except ConfigError:
        pytest.skip("no biases")
    train(model)
    save_adapter(model, tmp_path, base="base")
    again = load_adapter(build(kind), tmp_path)
    assert torch.equal(logits_of(again), logits_of(model.eval()))
    assert adapters_of(again)[0].options == adapters_of(model)[0].options
    assert len(frozen(again)) == len(frozen(model))


@pytest.mark.parametrize("method", ["lora", "pissa", "dora", "ia3"])
def test_two_adapters_of_one_model_are_written_and_read_apart(method: str, tmp_path: Path):
    model = METHODS[method](shaken(lora(build("gpt2"), rank=2), of="trained"))
    shaken(model, of="trained", std=0.1)
    first, second = sorted(adapters_of(model), key=lambda adapter: adapter.options.get("rank") != 2)
    save_adapter(model, tmp_path / "first", base="base", adapter=first)
    save_adapter(model, tmp_path / "second", base="base")  # the one that is trained
    again = load_adapter(load_adapter(build("gpt2"), tmp_path / "first"), tmp_path / "second")
    close(logits_of(again), logits_of(model))
    second.weight = 0.0
    close(logits_of(load_adapter(build("gpt2"), tmp_path / "first")), logits_of(model))
    with pytest.raises(ConfigError, match="0 adapters to choose from"):
        save_adapter(build("gpt2"), tmp_path, base="base")


def test_the_files_are_peft_s_and_nothing_else_is_left(tmp_path: Path):
    save_adapter(lora(build("gpt2"), rank=2), tmp_path, base="somewhere")
    save_adapter(lora(build("gpt2"), rank=4), tmp_path, base="somewhere")  # replaces the first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "somewhere"
    assert (config["peft_type"], config["task_type"], config["r"]) == ("LORA", "CAUSAL_LM", 4)
    assert config["target_modules"] == ["c_attn", "attn.c_proj"]
    assert config["rank_pattern"] == {"c_attn": 12}
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"
        assert file.get_tensor("base_model.model.transformer.h.0.attn.c_attn.lora_A.weight").shape == (12, 32)
