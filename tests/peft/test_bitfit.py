"""BitFit trains the biases of a model."""

import copy

import pytest
import torch
from peft_models import KINDS, build, frozen, logits_of, shaken, train
from torch import nn

from genai_pl.errors import ConfigError
from genai_pl.peft import adapters_disabled, adapters_of, bitfit, merge

WITHOUT = ("llama", "gemma3", "t5", "wrapped")
WITH = ["qwen2", *(kind for kind in KINDS if kind not in WITHOUT)]


@pytest.mark.parametrize("kind", WITH)
def test_it_starts_at_the_base_leaves_it_alone_and_merges_exactly(kind: str):
    base = build(kind).requires_grad_(False)
    model = bitfit(copy.deepcopy(base))
    assert torch.equal(logits_of(model), logits_of(base))
    before = frozen(model)
    losses = train(model)
    assert losses[-1] < losses[0]
    assert all(torch.equal(old, new) for old, new in zip(before, frozen(model), strict=True))
    model.eval()
    on, adapter = logits_of(model), adapters_of(model)[0]
    with adapters_disabled(model):
        assert torch.equal(logits_of(model), logits_of(base))
    adapter.rows = torch.tensor([0.0, 1.0])
    mixed = logits_of(model)
    assert torch.equal(mixed[0], logits_of(base)[0])
    torch.testing.assert_close(mixed[1], on[1], rtol=0, atol=1e-5)
    adapter.rows, adapter.weight = None, 0.6
    torch.testing.assert_close(logits_of(merge(copy.deepcopy(model))), logits_of(model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", WITH)
def test_it_learns_what_training_the_biases_themselves_learns(kind: str):
    plain, model = build(kind), bitfit(build(kind))
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(name.endswith(".bias"))
    ours = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert ours == sum(p.numel() for p in plain.parameters() if p.requires_grad)
    train(plain, steps=1)
    train(model, steps=1)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            same = plain.get_parameter(name.replace(".shift", ".bias").replace("base.", ""))
            torch.testing.assert_close(parameter.grad, same.grad, rtol=1e-4, atol=1e-6)


def test_the_bias_of_the_head_that_the_loss_reads_follows_the_switch():
    base = build("bert")
    bias = base.lm_head.bias.clone()
    model = shaken(bitfit(base), of="trained")
    torch.testing.assert_close(model.lm_head.bias, bias + model.lm_head.shift)
    with adapters_disabled(model):
        assert torch.equal(model.lm_head.bias, bias)


@pytest.mark.parametrize("kind", WITHOUT)
def test_a_model_without_biases_is_refused(kind: str):
    with pytest.raises(ConfigError, match=r"this model has no biases .*: choose peft=lora"):
        bitfit(build(kind))


def test_a_bias_of_an_unknown_layer_is_refused():
    model = build("gpt2")
    model.blocks[0].mlp.activation = nn.Conv1d(1, 1, 1)
    with pytest.raises(ConfigError, match="the bias of a Conv1d cannot be trained"):
        bitfit(model)
