"""IA3 scales keys, values and hidden units of the MLP."""

import copy

import pytest
import torch
from peft_models import KINDS, build, frozen, logits_of, shaken, train

from genai_pl.errors import ConfigError
from genai_pl.peft import adapters_disabled, adapters_of, ia3, merge


@pytest.mark.parametrize("kind", KINDS)
def test_it_starts_at_the_base_leaves_it_alone_and_merges_exactly(kind: str):
    base = build(kind).requires_grad_(False)
    model = ia3(copy.deepcopy(base))
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
    assert torch.equal(mixed[1], on[1])
    adapter.rows, adapter.weight = None, 0.6
    torch.testing.assert_close(logits_of(merge(copy.deepcopy(model))), logits_of(model), rtol=0, atol=1e-5)


def test_a_scale_multiplies_rows_of_keys_and_values_and_columns_of_the_mlp():
    base = build("gpt2")
    model = shaken(ia3(copy.deepcopy(base)), of="trained")
    block, old = model.blocks[0], base.blocks[0]
    keys, down = block.attention.k_proj.scale, block.mlp.down_proj.scale
    merge(model)
    torch.testing.assert_close(block.attention.k_proj.weight, keys[:, None] * old.attention.k_proj.weight)
    torch.testing.assert_close(block.attention.k_proj.bias, keys * old.attention.k_proj.bias)
    torch.testing.assert_close(block.mlp.down_proj.weight, old.mlp.down_proj.weight * down)
    assert torch.equal(block.mlp.down_proj.bias, old.mlp.down_proj.bias)
    assert torch.equal(block.attention.q_proj.weight, old.attention.q_proj.weight)


def test_few_parameters_are_trained():
    model = ia3(build("llama"))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == 2 * (16 + 16 + model.config.intermediate_size)  # Liu et al. 2022: d_k + d_v + d_ff per layer


def test_modules_can_be_trained_whole_beside_it():
    model = ia3(build("llama"), modules_to_save=["norm"])
    train(model)
    torch.testing.assert_close(
        logits_of(merge(copy.deepcopy(model)).eval()), logits_of(model.eval()), rtol=0, atol=1e-5
    )


def test_what_is_no_target_cannot_have_its_input_scaled():
    message = "peft.feedforward_modules: up_proj is none of peft.target_modules: k_proj, v_proj, down_proj"
    with pytest.raises(ConfigError, match=message):
        ia3(build("llama"), feedforward_modules=["up_proj"])
