"""Frozen weights in 16 bits: the numbers of float32 weights to the last bit, in half their memory, or unchanged."""

import copy

import pytest
import torch
from torch import Tensor, nn

from genai_pl import peft
from genai_pl.errors import ConfigError
from genai_pl.kernels import linear_cross_entropy
from genai_pl.models import EncoderDecoder, ModelConfig, build_model
from genai_pl.models.frozen import FrozenLinear, hold_frozen_in_16_bits, hold_frozen_in_32_bits, is_held_in_16_bits
from tests.models.test_packed_linear import KINDS, SIZES

MIXTURE = {**KINDS["qwen3"], "n_experts": 4, "experts_per_token": 2, "expert_size": 24}
ALL = {**KINDS, "mixture": MIXTURE}
ids = torch.arange(24).view(2, 12) % 60


def build(kind: str, *, rounded: bool = True, dora: bool = False) -> nn.Module:
    """A frozen model with LoRA (or DoRA) that is not zero; `rounded` as if its file were in bfloat16."""
    torch.manual_seed(0)
    model = build_model(ModelConfig(**{**SIZES, **ALL[kind]}))
    if rounded:
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16().float()
    model = peft.lora(model, rank=2, target_modules="all-linear", dora=dora)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter)
    return model


def outputs(model: nn.Module) -> list[Tensor]:
    """Logits, and the gradients of what is trained."""
    model.zero_grad()
    is_pair = isinstance(model, EncoderDecoder)
    logits = model(ids, decoder_input_ids=ids) if is_pair else model(ids)
    logits.float().logsumexp(-1).sum().backward()
    return [logits.detach(), *(p.grad for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", ALL)
def test_no_bit_of_logits_and_gradients_changes(kind: str, autocast: bool) -> None:
    model = build(kind)
    held = copy.deepcopy(model)
    saved = hold_frozen_in_16_bits(held, rounds=False)
    assert saved > 0.8 * sum(p.nbytes for p in model.parameters() if not p.requires_grad and p.dim() > 1) / 2
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected, found = outputs(model), outputs(held)
    assert len(expected) == len(found) > 8
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_products_under_autocast_are_those_of_weights_that_have_more_bits(kind: str) -> None:
    model = build(kind, rounded=False)
    held = copy.deepcopy(model)
    assert hold_frozen_in_16_bits(held, rounds=True) > 0
    assert held.embed.weight.dtype is torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        for ours, theirs in zip(outputs(held), outputs(model), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    with pytest.raises(ConfigError, match="load it again to merge"):
        peft.merge(held)


def test_the_loss_multiplies_by_a_head_in_16_bits() -> None:
    model = build("llama")
    held = copy.deepcopy(model)
    hold_frozen_in_16_bits(held, rounds=False)
    assert held.lm_head.weight is held.embed.weight
    assert held.embed.weight.dtype is torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        losses = [linear_cross_entropy(m.to_head(m.features(ids)), m.lm_head.weight, ids) for m in (model, held)]
    assert losses[0] == losses[1]


def test_what_would_lose_a_bit_or_is_trained_stays_in_float32() -> None:
    model = build("llama", rounded=False)
    assert hold_frozen_in_16_bits(model, rounds=False) == 0
    assert not is_held_in_16_bits(model)
    trained = build("gpt2").requires_grad_(True)
    assert hold_frozen_in_16_bits(trained, rounds=True) == 0
    # one weight with a bit more than bfloat16 has
    model = build("llama")
    model.blocks[0].mlp.down_proj.base.weight.data[0, 0] = 1 + 2**-12
    hold_frozen_in_16_bits(model, rounds=False)
    assert type(model.blocks[0].mlp.down_proj.base) is nn.Linear
    assert type(model.blocks[1].mlp.down_proj.base) is FrozenLinear


def test_a_merge_is_that_of_float32_weights() -> None:
    model = build("llama")
    held = copy.deepcopy(model)
    hold_frozen_in_16_bits(held, rounds=False)
    expected, merged = peft.merge(model).state_dict(), peft.merge(held).state_dict()
    assert merged.keys() == expected.keys()
    for name, weight in merged.items():
        assert weight.dtype is torch.float32
        assert torch.equal(weight, expected[name])


def test_back_in_32_bits_all_is_as_before() -> None:
    model = build("mixture")
    held = copy.deepcopy(model)
    hold_frozen_in_16_bits(held, rounds=False)
    hold_frozen_in_32_bits(held)
    for ours, theirs in zip(held.modules(), model.modules(), strict=True):
        assert type(ours) is type(theirs)
    for ours, theirs in zip(held.parameters(), model.parameters(), strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


def test_a_reward_model_shares_a_base_that_is_held_in_16_bits() -> None:
    policy, judge = build("llama", rounded=False), build("llama", rounded=False)
    saved = hold_frozen_in_16_bits(policy, rounds=True)
    assert peft.share_frozen(judge, policy) >= saved
    assert judge.blocks[0].attention.q_proj.base.weight is policy.blocks[0].attention.q_proj.base.weight


def test_a_dora_reward_model_keeps_the_weights_whose_norms_it_takes() -> None:
    policy, judge = build("llama", rounded=False), build("llama", rounded=False, dora=True)
    hold_frozen_in_16_bits(policy, rounds=True)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = judge(ids)
        peft.share_frozen(judge, policy)
        assert torch.equal(judge(ids), expected)
