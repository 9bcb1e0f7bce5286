"""Rollouts sample from a copy with merged adapters: its tokens are the model's, which stays as it was."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from genai_pl import peft
from genai_pl.config.generation import GenerationConfig
from genai_pl.generation.decode import generate
from genai_pl.kernels.row_products import is_built
from genai_pl.modules.rollout_policy import WORTH, rollout_policy
from tests.models.test_packed_linear import build

GREEDY = GenerationConfig(max_new_tokens=8, temperature=0.0)
ADAPTERS = {
    "none": lambda model: model,
    "lora": lambda model: peft.lora(model, rank=2, target_modules="all-linear"),
    "dora": lambda model: peft.lora(model, rank=2, dora=True),
    "pissa": lambda model: peft.lora(model, rank=2, init="pissa"),
    "ia3": peft.ia3,
    "bitfit": peft.bitfit,
    "head": lambda model: peft.lora(model, rank=2, modules_to_save=["lm_head"]),
    "two": lambda model: peft.ia3(peft.lora(model, rank=2)),
}
pytestmark = pytest.mark.skipif(not is_built(), reason="no C compiler")


def trained(kind: str, adapter: str) -> nn.Module:
    """A model in training mode whose trained parameters are not those of its initialization."""
    model = ADAPTERS[adapter](build(kind).requires_grad_(True)).train()
    with torch.no_grad():
        for parameter in filter(lambda p: p.requires_grad, model.parameters()):
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


CASES = [("gpt2", adapter) for adapter in ADAPTERS] + [("qwen3", "lora"), ("llama", "two"), ("llama", "head")]


@pytest.mark.parametrize(("kind", "adapter"), CASES)
def test_its_tokens_are_those_of_the_model_which_stays_as_it_was(kind: str, adapter: str) -> None:
    torch.manual_seed(0)
    model = trained(kind, adapter)
    state = copy.deepcopy(model.state_dict())
    learned = [p.requires_grad for p in model.parameters()]
    ids = torch.randint(3, 50, (3, 9))
    expected = generate(copy.deepcopy(model).double(), ids, GREEDY)
    with rollout_policy(model, WORTH) as policy:
        assert policy.fused.step is not None
        assert not any(p.requires_grad for p in policy.parameters())
        assert torch.equal(generate(policy, ids, GREEDY), expected)
    assert all(module.training for module in model.modules())
    assert [p.requires_grad for p in model.parameters()] == learned
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    # what is learned afterwards is in the next copy
    with torch.no_grad():
        for parameter in filter(lambda p: p.requires_grad, model.parameters()):
            parameter.mul_(-1)
    expected = generate(copy.deepcopy(model).double(), ids, GREEDY)
    with rollout_policy(model, WORTH) as policy:
        assert torch.equal(generate(policy, ids, GREEDY), expected)


def test_memory_that_no_adapter_changes_is_shared() -> None:
    model = trained("llama", "lora")
    with rollout_policy(model, WORTH) as policy:
        assert policy.embed.table.data_ptr() == model.embed.weight.data_ptr()
        assert policy.norm.weight.data_ptr() == model.norm.weight.data_ptr()
    model = trained("gpt2", "none")
    with rollout_policy(model, WORTH) as policy:
        assert policy.blocks[0].mlp.up_proj.packed.weight.data_ptr() == model.blocks[0].mlp.up_proj.weight.data_ptr()


def test_no_memory_is_left_to_the_garbage_collector() -> None:
    model = trained("llama", "lora")
    gc.collect()
    gc.disable()
    try:
        with rollout_policy(model, WORTH) as policy:
            packed = weakref.ref(policy.blocks[0].attention.o_proj.packed.weight)
            generate(policy, torch.randint(3, 50, (2, 5)), GREEDY)
        assert packed() is None
    finally:
        gc.enable()


def test_few_tokens_are_not_worth_a_copy() -> None:
    model = trained("llama", "lora")
    with rollout_policy(model, WORTH - 1) as policy:
        assert policy is model


@pytest.mark.parametrize("case", ["autocast", "16 bits", "codes", "prompt", "prefix", "bottleneck", "gemma3"])
def test_models_that_cannot_be_merged_exactly_sample_themselves(case: str) -> None:
    model = build("gemma3" if case == "gemma3" else "llama")
    if case in ("prompt", "prefix", "bottleneck"):
        model = getattr(peft, case)(model)
    elif case == "16 bits":
        model = model.bfloat16()
    elif case == "codes":
        model = peft.lora(model, quantize="int8")
    with torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"), rollout_policy(model, WORTH) as policy:
        assert policy is model
