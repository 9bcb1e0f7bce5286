"""Parameter groups: which parameters are trained, and which of them decay."""

import pytest
import torch
from torch import nn

from genai_pl.errors import ConfigError
from genai_pl.optim import decay_groups


def tied_model() -> nn.ModuleDict:
    model = nn.ModuleDict(
        {
            "embed_tokens": nn.Embedding(11, 4),
            "up_proj": nn.Linear(4, 8),
            "norm": nn.LayerNorm(8),
            "lm_head": nn.Linear(4, 11, bias=False),
        }
    )
    model["lm_head"].weight = model["embed_tokens"].weight
    return model


def test_only_matrices_and_embeddings_decay():
    decayed, free = (group["params"] for group in decay_groups(tied_model().named_parameters(), 0.1))
    assert [name for name, _ in decayed] == ["embed_tokens.weight", "up_proj.weight"]
    assert [name for name, _ in free] == ["up_proj.bias", "norm.weight", "norm.bias"]


def test_the_groups_carry_the_decay_that_was_asked_for():
    assert [group["weight_decay"] for group in decay_groups(tied_model().named_parameters(), 0.3)] == [0.3, 0.0]


def test_a_tied_weight_appears_once_under_its_first_name():
    named = tied_model().named_parameters(remove_duplicate=False)
    names = [name for group in decay_groups(named, 0.1) for name, _ in group["params"]]
    assert names.count("embed_tokens.weight") == 1
    assert "lm_head.weight" not in names


def test_frozen_parameters_are_left_out_and_empty_groups_too():
    model = tied_model()
    model.requires_grad_(False)
    model["norm"].bias.requires_grad_(True)
    (group,) = decay_groups(model.named_parameters(), 0.1)
    assert [name for name, _ in group["params"]] == ["norm.bias"]


def test_a_model_without_trainable_parameters_is_an_error():
    with pytest.raises(ConfigError, match="frozen"):
        decay_groups(tied_model().requires_grad_(False).named_parameters(), 0.1)


def test_torch_keeps_the_names_for_messages():
    optimizer = torch.optim.SGD(decay_groups(tied_model().named_parameters(), 0.1), lr=0.1)
    assert optimizer.param_groups[0]["param_names"] == ["embed_tokens.weight", "up_proj.weight"]
