"""Bottleneck adapters follow the parts of a block."""

import pytest
import torch
from peft_models import KINDS, build, frozen, logits_of, shaken, train
from torch.nn import functional as F

from genai_pl.errors import ConfigError
from genai_pl.models import load_wrapped
from genai_pl.peft import adapters_disabled, adapters_of, bottleneck


@pytest.mark.parametrize("options", [{"size": 8}, {"after": "mlp", "activation": "gelu"}], ids=["both", "mlp"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_starts_at_the_base_and_leaves_it_alone(kind: str, options: dict):
    base, model = build(kind).requires_grad_(False), bottleneck(build(kind), **options)
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


def test_it_adds_a_small_mlp_of_what_a_part_says():
    base, model = build("llama"), shaken(bottleneck(build("llama"), size=3), of="trained")
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    layer, y = model.blocks[1].mlp, base.blocks[1].mlp(x)
    hidden = F.relu(y @ layer.down.weight.T + layer.down.bias)  # Houlsby et al. 2019, figure 2
    torch.testing.assert_close(layer(x), y + hidden @ layer.up.weight.T + layer.up.bias, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("after", "layers"), [("both", 4), ("mlp", 2)])
def test_its_size_is_that_of_the_paper(after: str, layers: int):
    model = bottleneck(build("gpt2"), size=8, after=after)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == layers * (2 * 32 * 8 + 32 + 8)  # Houlsby et al. 2019, section 2.1: 2md + d + m


def test_two_nest():
    one = shaken(bottleneck(build("gpt2"), size=4), of="trained")
    two = shaken(bottleneck(bottleneck(build("gpt2"), size=4), size=5), of="trained")
    assert len(adapters_of(two)) == 2
    with adapters_disabled(two):
        assert torch.equal(logits_of(two), logits_of(build("gpt2").requires_grad_(False)))
    assert adapters_of(one)[0].options["size"] == 4


def test_a_mistake_is_one_line(tmp_path):
    for options, message in (
        ({"after": "attention"}, "peft.after=attention is not one of both, mlp"),
        ({"activation": "tanh"}, "peft.activation=tanh is not one of relu, gelu"),
        ({"size": 0}, "peft.size must be above 0, not 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            bottleneck(build("gpt2"), **options)


def test_a_model_whose_blocks_have_no_mlp_is_refused(tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "ffn_dim": 40, "vocab_size": 61}
    values = AutoConfig.for_model(
        "opt", **sizes, word_embed_proj_dim=32, pad_token_id=0, bos_token_id=1, eos_token_id=2
    )
    AutoModelForCausalLM.from_config(values).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"no block has a part called mlp; they have: self_attn, .*fc1"):
        bottleneck(load_wrapped(str(tmp_path)))
