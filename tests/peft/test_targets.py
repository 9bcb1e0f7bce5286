"""Targets are matched by name; a name without a match is an error that lists the names."""

import pytest
import torch
from peft_models import build, theirs_of

from genai_pl.config.enums import Head
from genai_pl.errors import ConfigError
from genai_pl.peft import adapters_of, describe, ia3, lora
from genai_pl.peft.targets import match, module_sites

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*")  # in the peft library
DEFAULT = ("q_proj", "v_proj")


def names(model: torch.nn.Module, target_modules: str | list[str] | None) -> list[str]:
    return [site.names[0] for site in match(model, target_modules, default=DEFAULT)]


def test_names_ends_of_names_and_patterns_choose():
    model = build("llama")
    assert names(model, None) == [f"blocks.{i}.attention.{p}_proj" for i in (0, 1) for p in "qv"]
    assert names(model, ["o_proj"]) == ["blocks.0.attention.o_proj", "blocks.1.attention.o_proj"]
    assert names(model, ["1.attention.q_proj", "up_proj"]) == [
        "blocks.0.mlp.up_proj", "blocks.1.attention.q_proj", "blocks.1.mlp.up_proj"
    ]  # fmt: skip
    assert names(model, r".*\.1\..*(gate|up)_proj") == ["blocks.1.mlp.gate_proj", "blocks.1.mlp.up_proj"]
    assert len(names(model, "all-linear")) == 2 * 7


@pytest.mark.parametrize(("kind", "n"), [("gpt2", 12), ("bert", 12), ("albert", 6), ("t5", 32), ("wrapped", 14)])
def test_all_linear_is_every_linear_layer_of_the_blocks(kind: str, n: int):
    assert len(names(build(kind), "all-linear")) == n


def test_all_linear_is_what_the_peft_library_takes():
    peft = pytest.importorskip("peft")
    model = build("wrapped")
    theirs = peft.get_peft_model(theirs_of(model), peft.LoraConfig(target_modules="all-linear"))
    assert {f"inner.{name}" for name in theirs.targeted_module_names} == set(names(model, "all-linear"))


@pytest.mark.parametrize("how", [lora, ia3])
def test_adapters_do_not_change_the_names(how):
    plain, model = build("t5"), build("t5")
    assert [site.names for site in module_sites(how(how(model)))] == [site.names for site in module_sites(plain)]
    assert names(model, "all-linear") == names(plain, "all-linear")
    assert len(adapters_of(model)) == 2


@pytest.mark.parametrize(
    ("kind", "targets", "message"),
    [
        (
            "gpt2",
            ["q_proj", "c_attn"],
            "no module is called c_attn; there are: q_proj, k_proj, v_proj, o_proj, up_proj",
        ),
        ("wrapped", ["attn"], "no module is called attn; there are: q_proj, .*gate_proj"),
        (
            "llama",
            "q_proj",
            r"no module is called q_proj \(a regular expression of whole names; write \[a,b\] for names\)",
        ),
        ("llama", "(", r"peft.target_modules=\(: not a regular expression"),
        ("llama", [], "peft.target_modules is empty"),
        ("llama", ["lm_head"], r"lm_head is not adapted but trained whole, by peft.modules_to_save=\[lm_head\]"),
        ("llama", ["embed"], r"embed is not adapted but trained whole, by peft.modules_to_save=\[embed\]"),
        ("llama", ["norm1"], "norm1 is a RMSNorm, which is not adapted"),
        ("xlnet", ["r_proj"], "r_proj is a Linear, which is not adapted"),
    ],
)
def test_a_target_that_matches_nothing_is_one_line(kind: str, targets: object, message: str):
    with pytest.raises(ConfigError, match=message):
        lora(build(kind), target_modules=targets)


def test_a_default_that_a_model_of_transformers_calls_otherwise_must_be_named():
    with pytest.raises(ConfigError, match=r"peft.target_modules: no module is called query; there are: q_proj"):
        match(build("wrapped"), None, default=("q_proj", "query"))
    assert names(build("reformer"), None)  # ours may lack one


def test_the_head_of_a_reward_model_is_trained_with_every_adapter():
    for how in (lora, ia3):
        model = build("llama")
        model.set_head(Head.score)
        how(model)
        assert "score.copy.weight" in {name for name, p in model.named_parameters() if p.requires_grad}


def test_a_summary_counts_as_the_peft_library_does(capsys):
    peft = pytest.importorskip("peft")
    model = build("wrapped")
    theirs = peft.get_peft_model(theirs_of(model), peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    theirs.print_trainable_parameters()
    lines = describe(lora(model, rank=4, target_modules=["q_proj", "down_proj"]))
    assert lines[-1] == capsys.readouterr().out.strip()
    assert lines[0].startswith("adapter     lora: rank=4 alpha=16")
    assert lines[1:3] == [
        "  q_proj         2 x LoRALinear 32 -> 32, 256 parameters each",
        "  down_proj      2 x LoRALinear 40 -> 32, 288 parameters each",
    ]
