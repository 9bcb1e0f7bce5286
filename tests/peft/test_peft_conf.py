"""Every option of peft= builds the adapter that its YAML describes."""

import inspect
from pathlib import Path

import pytest
import torch
from hydra.utils import get_method
from omegaconf import OmegaConf
from peft_models import build, logits, logits_of, shaken

from genai_pl.cli.command import CONF
from genai_pl.peft import METHODS, adapters_of, lora

OPTIONS = sorted(path for path in CONF.glob("peft/*.yaml") if path.stem not in ("none", "dora"))


@pytest.mark.parametrize("path", OPTIONS, ids=lambda path: path.stem)
def test_the_yaml_has_the_options_of_the_function_with_their_defaults(path: Path):
    chosen = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    method = get_method(chosen.pop("_target_"))
    assert chosen.pop("_partial_") is True
    del chosen["defaults"], chosen["init_from"]  # what the run does with it
    for name, value in chosen.items():
        default = inspect.signature(method).parameters[name].default
        assert value == default or (value == {} and default is None) or isinstance(value, str)


@pytest.mark.parametrize("path", OPTIONS, ids=lambda path: path.stem)
def test_its_name_is_the_adapter_s(path: Path):
    chosen = OmegaConf.load(path)
    model = get_method(chosen._target_)(build("qwen2"))
    assert [adapter.method for adapter in adapters_of(model)] == [path.stem]
    assert logits_of(model).isfinite().all()


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # the compiler looks at it
@pytest.mark.parametrize(
    "method", [name if name == "dora" else pytest.param(name, marks=pytest.mark.slow) for name in METHODS]
)
def test_compiled_blocks_give_the_same_logits_and_gradients(method: str):
    options = {"dora": True} if method == "dora" else {}
    model = shaken(METHODS[method].make(build("qwen2"), **options), of="trained")
    trained = [p for p in model.parameters() if p.requires_grad]
    expected = logits(model)
    gradients = torch.autograd.grad(expected.sum(), trained)
    for block in model.blocks:
        block.compile(backend="aot_eager")
    actual = logits(model)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(actual.sum(), trained), gradients, rtol=1e-3, atol=1e-3)


def test_dora_is_lora_with_one_option_more():
    chosen = OmegaConf.load(CONF / "peft" / "dora.yaml")
    assert (chosen.pop("defaults"), chosen) == (["lora", "_self_"], {"dora": True})
    assert [adapter.method for adapter in adapters_of(lora(build("gpt2"), dora=True))] == ["dora"]
