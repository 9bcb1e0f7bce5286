"""Fully trained layers beside an adapter: copies are trained while the base stays frozen."""

import pytest
import torch
from peft_models import build, logits_of, shaken, train

from genai_pl.errors import ConfigError
from genai_pl.peft import adapters_disabled, adapters_of, lora, merge, tie_weights


def test_layers_trained_whole_stay_tied_if_they_were():
    model = lora(build("gpt2"), modules_to_save=["embed", "lm_head"])
    assert model.lm_head.copy.weight is model.embed.copy.weight
    assert model.lm_head.weight is model.embed.copy.weight
    train(model)
    merge(model)
    assert model.lm_head.weight is model.embed.weight
    assert model.config.tie_embeddings
    apart = lora(build("gpt2"), modules_to_save=["embed"])
    assert apart.lm_head.weight is not apart.embed.weight
    train(apart)
    merge(apart)
    assert not apart.config.tie_embeddings


@pytest.mark.parametrize("saved", [["embed"], ["embed", "lm_head"]])
@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_ties_survive_a_state_that_is_loaded(kind: str, saved: list[str]):
    model, again = (lora(build(kind), modules_to_save=saved) for _ in range(2))
    train(model)
    again.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    tie_weights(again)
    assert torch.equal(logits_of(again.eval()), logits_of(model.eval()))
    assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in model.parameters())
    with adapters_disabled(again), adapters_disabled(model):
        assert torch.equal(logits_of(again), logits_of(model))
    tie_weights(merge(again))


def test_the_head_that_the_loss_reads_follows_the_switch():
    base = build("bert")
    weight, bias = base.lm_head.weight.clone(), base.lm_head.bias.clone()
    model = shaken(lora(base, modules_to_save=["lm_head"]), of="trained")
    adapter = adapters_of(model)[0]
    copied = model.lm_head.copy
    assert model.lm_head.weight is copied.weight
    assert model.lm_head.bias is copied.bias
    adapter.weight = 0.5
    torch.testing.assert_close(model.lm_head.weight, (weight + copied.weight) / 2)
    torch.testing.assert_close(model.lm_head.bias, (bias + copied.bias) / 2)
    with adapters_disabled(model):
        assert torch.equal(model.lm_head.weight, weight)
        assert torch.equal(model.lm_head.bias, bias)
    adapter.rows = torch.ones(2)
    with pytest.raises(ConfigError, match="adapters by row"):
        _ = model.lm_head.weight
