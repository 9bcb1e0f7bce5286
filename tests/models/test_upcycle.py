"""Upcycling: a mixture whose experts all begin as the dense MLP computes what the dense model computes."""

from copy import deepcopy
from dataclasses import asdict

import pytest
import torch

from genai_pl.errors import ConfigError
from genai_pl.models import Decoder, EncoderDecoder, ModelConfig
from genai_pl.models.upcycle import upcycle, upcycled_config
from genai_pl.peft import lora
from tests.small_models import MODELS

WANTED = {**asdict(ModelConfig()), "n_experts": 4}


@pytest.mark.parametrize("router", ["softmax", "sigmoid"])
@pytest.mark.parametrize("values", [MODELS["gpt2"], MODELS["llama"], MODELS["the seed"]], ids=["gpt2", "llama", "seed"])
def test_the_first_step_has_the_logits_of_the_dense_model(values: dict, router: str) -> None:
    torch.manual_seed(0)
    dense = Decoder(ModelConfig(**values)).eval()
    for parameter in dense.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    ids = torch.randint(200, (2, 16))
    expected = dense(ids)
    config = upcycled_config(dense.config, {**WANTED, "router": router, "expert_every": 2})
    mixture = upcycle(deepcopy(dense), config)
    assert [block.is_mixture for block in mixture.blocks] == [False, True, False]
    torch.testing.assert_close(mixture(ids), expected, rtol=0, atol=1e-5)
    assert mixture.config.expert_size == dense.config.intermediate_size
    # experts are weights of their own, which a step can move apart
    assert mixture.blocks[1].mlp.experts.up_proj.weight.is_contiguous()
    mixture.train()(ids).logsumexp(-1).sum().backward()
    assert all(parameter.grad is not None for parameter in mixture.blocks[1].mlp.parameters())


def test_both_stacks_of_an_encoder_decoder_are_upcycled() -> None:
    torch.manual_seed(0)
    sizes = {**MODELS["gpt2"], "shape": "encoder_decoder", "n_decoder_layer": 2}
    dense = EncoderDecoder(ModelConfig(**sizes)).eval()
    ids = torch.randint(1, 200, (2, 8))
    expected = dense(ids, decoder_input_ids=ids)
    mixture = upcycle(dense, upcycled_config(dense.config, WANTED))
    assert all(block.is_mixture for stack in (mixture.encoder, mixture.decoder) for block in stack.blocks)
    torch.testing.assert_close(mixture(ids, decoder_input_ids=ids), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"expert_size": 8}, "expert_size"),
        ({"n_shared_experts": 1}, "n_shared_experts"),
        ({"normalize_top_k": False}, "normalize_top_k"),
        ({"router_scale": 2.0}, "router_scale"),
        ({"experts_per_token": 9}, "experts_per_token"),
    ],
)
def test_options_that_would_change_the_first_loss_are_refused(options: dict, word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        upcycled_config(ModelConfig(**MODELS["llama"]), {**WANTED, **options})


def test_a_model_with_an_adapter_is_refused() -> None:
    model = lora(Decoder(ModelConfig(**MODELS["llama"])), target_modules=["up_proj"])
    with pytest.raises(ConfigError, match="merge it first"):
        upcycle(model, upcycled_config(model.config, WANTED))
