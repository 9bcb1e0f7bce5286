"""Rollouts round weights once: as exact as weights that are rounded for each token, and nothing is left behind."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from genai_pl import peft
from genai_pl.config.generation import GenerationConfig
from genai_pl.kernels.packed_product import BF16
from genai_pl.models import packed_linear
from genai_pl.models.frozen import hold_frozen_in_16_bits
from genai_pl.models.packed_linear import packed_products
from genai_pl.modules import rollout
from tests.models.test_packed_linear import DECODERS, build

GREEDY = GenerationConfig(max_new_tokens=12, temperature=0.0)
PROMPTS = [np.arange(5) + 3, np.arange(9) + 20]


def completions(model: nn.Module) -> list[list[int]]:
    options = {"generator": torch.Generator().manual_seed(0), "ends": [59], "pad": 0}
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        return rollout.generate_rollout(model, PROMPTS, GREEDY, **options).completions


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("kind", DECODERS)
def test_packed_products_are_as_exact_as_autocasts_and_leave_nothing_behind(kind: str, held: bool) -> None:
    model = peft.lora(build(kind), rank=2)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter)
    ids = torch.arange(24).view(2, 12)
    exact = copy.deepcopy(model).double()(ids).detach()
    if held:
        hold_frozen_in_16_bits(model, rounds=True)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False), torch.no_grad():
        rounded = model(ids)
        with packed_products(model):
            packed = model(ids)
    assert not torch.equal(packed, exact.float())
    assert (packed - exact).norm() < 1.5 * (rounded - exact).norm()
    assert not any("forward" in module.__dict__ for module in model.modules())
    # nor does a rollout: a cast that was made without gradients would stop those of the next pass
    assert all(completions(model))
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        model(ids).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_without_the_product_layers_use_their_own(monkeypatch) -> None:
    def lacks(weight: torch.Tensor) -> object:
        raise NotImplementedError("not on this processor")

    monkeypatch.setattr(packed_linear, "BF16", BF16._replace(pack=lacks))
    model = build("gpt2")
    with packed_products(model):
        assert not any("forward" in module.__dict__ for module in model.modules())
        assert model(torch.arange(8)[None]).isfinite().all()


def test_weights_that_change_are_rounded_anew() -> None:
    model = build("gpt2").requires_grad_(True)
    before = completions(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(-1)
    assert completions(model) != before
