"""Adapters taken out of a model again: what stays computes what it computed without them."""

import pytest
import torch

from genai_pl import peft
from genai_pl.models import Decoder, ModelConfig, build_model
from genai_pl.peft import adapters_of, remove_adapter
from genai_pl.peft.adapter import AdapterLayer

IDS = torch.arange(12).view(1, 12)
METHODS = {
    "lora": lambda model: peft.lora(model, target_modules=["q_proj", "up_proj"], modules_to_save=["lm_head"]),
    "dora": lambda model: peft.lora(model, dora=True),
    "ia3": peft.ia3,
    "bitfit": peft.bitfit,
    "bottleneck": peft.bottleneck,
    "prefix": lambda model: peft.prefix(model, n_tokens=3),
    "prompt": lambda model: peft.prompt(model, n_tokens=3),
}


def build() -> Decoder:
    torch.manual_seed(0)
    config = ModelConfig(n_layer=2, n_head=2, n_embd=16, vocab_size=20, max_seq_len=16, bias=True, norm="layernorm")
    return build_model(config).eval()


def disturbed(model: Decoder, seed: int) -> Decoder:
    """The model with random numbers in its newest adapter."""
    newest, generator = adapters_of(model)[-1], torch.Generator().manual_seed(seed)
    layers = [module for module in model.modules() if isinstance(module, AdapterLayer) and module.adapter is newest]
    for layer in layers:
        for name, parameter in layer.named_parameters():
            if not name.startswith("base."):
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.5
    return model.eval()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("removed", [0, 1])
def test_the_other_adapter_stays(method: str, removed: int) -> None:
    makers = {"lora": METHODS["lora"], "other": METHODS[method]}
    both = build()
    before = {name: tensor.clone() for name, tensor in both.state_dict().items()}
    for seed, make in enumerate(makers.values()):
        disturbed(make(both), seed)
    remove_adapter(both, adapters_of(both)[removed])
    # the same model with the other adapter alone
    seed, make = [*enumerate(makers.values())][1 - removed]
    alone = disturbed(make(build()), seed)
    assert len(adapters_of(both)) == 1
    assert both.state_dict().keys() == alone.state_dict().keys()
    torch.testing.assert_close(both(IDS), alone(IDS), rtol=0, atol=0)
    # and then none
    remove_adapter(both, adapters_of(both)[0])
    assert not any(isinstance(module, AdapterLayer) for module in both.modules())
    assert both.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in both.state_dict().items())
