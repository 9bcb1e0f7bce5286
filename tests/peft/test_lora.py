"""LoRA, DoRA, rsLoRA and PiSSA: the base never changes, and the change is that of the papers and of PEFT."""

import copy
import math

import pytest
import torch
from peft_models import KINDS, build, frozen, logits_of, shaken, tokens, train
from torch import nn

from genai_pl.errors import ConfigError
from genai_pl.models import WrappedDecoder, save_pretrained
from genai_pl.peft import adapters_disabled, adapters_of, bitfit, bottleneck, ia3, lora, merge
from tests.conftest import some

WAYS = {
    "lora": {"rank": 4},
    "all_linear": {"target_modules": "all-linear", "rslora": True},
    "pissa": {"rank": 4, "init": "pissa"},
    "dora": {"dora": True},
    "pissa_dora": {"rank": 3, "init": "pissa", "dora": True, "rslora": True},
    "saved": {"target_modules": ["v_proj"], "modules_to_save": ["embed", "lm_head"]},
}


def ways_of(kind: str, way: str) -> dict[str, object]:
    options = dict(WAYS[way])
    if kind == "wrapped" and way == "saved":
        options["modules_to_save"] = ["embed_tokens", "lm_head"]
    return options


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", some(KINDS))
def test_it_starts_at_the_base_leaves_it_alone_and_merges_exactly(kind: str, way: str):
    base = build(kind)
    model = lora(copy.deepcopy(base).requires_grad_(False), **ways_of(kind, way))
    assert torch.equal(logits_of(model), logits_of(base))
    before = frozen(model)
    losses = train(model)
    assert losses[-1] < losses[0]
    assert all(torch.equal(old, new) for old, new in zip(before, frozen(model), strict=True))
    model.eval()
    with adapters_disabled(model):
        assert torch.equal(logits_of(model), logits_of(base))
    for weight in (0.3, 1.0):
        adapters_of(model)[0].weight = weight
        merged = merge(copy.deepcopy(model))
        torch.testing.assert_close(logits_of(merged), logits_of(model), rtol=0, atol=1e-5)
        assert merged.state_dict().keys() == base.state_dict().keys()
        assert all(p.requires_grad for p in merged.parameters())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["gpt2", "bert", "t5", "wrapped"])
def test_every_row_has_its_own_weight(kind: str, way: str):
    model = lora(build(kind), **ways_of(kind, way))
    train(model)
    model.eval()
    on, adapter = logits_of(model), adapters_of(model)[0]
    with adapters_disabled(model):
        off = logits_of(model)
    adapter.weight = 0.25
    quarter = logits_of(model)
    adapter.rows = torch.tensor([0.0, 1.0])
    mixed = logits_of(model)
    assert torch.equal(mixed[0], off[0])
    torch.testing.assert_close(mixed[1], on[1], rtol=0, atol=1e-5)
    adapter.rows = torch.tensor([0.25, 0.0])
    torch.testing.assert_close(logits_of(model)[0], quarter[0], rtol=0, atol=1e-5)


def test_two_adapters_add_up_and_can_be_turned_off_apart():
    base, one, two = (build("llama").requires_grad_(False) for _ in range(3))
    shaken(lora(one, rank=2, alpha=3.0, target_modules=["o_proj"]), of="trained", seed=1)
    shaken(lora(two, rank=4, dora=True), of="trained", seed=2)
    both = lora(copy.deepcopy(one), rank=4, dora=True)
    first = min(adapters_of(both), key=lambda adapter: adapter.options["rank"])
    second = max(adapters_of(both), key=lambda adapter: adapter.options["rank"])
    trained = {name: p for name, p in two.named_parameters() if p.requires_grad}
    for name, parameter in both.named_parameters():
        if parameter.requires_grad:
            parameter.data.copy_(trained[name])
    second.weight = 0.0
    assert torch.equal(logits_of(both), logits_of(one))
    first.weight, second.weight = 0.0, 1.0
    assert torch.equal(logits_of(both), logits_of(two))
    first.rows, second.rows = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    mixed = logits_of(both)
    assert torch.equal(mixed[0], logits_of(one)[0])
    assert torch.equal(mixed[1], logits_of(two)[1])
    with adapters_disabled(both):
        assert torch.equal(logits_of(both), logits_of(base))
    first.rows = second.rows = None
    first.weight = second.weight = 0.5
    torch.testing.assert_close(logits_of(merge(copy.deepcopy(both))), logits_of(both), rtol=0, atol=1e-5)


def test_all_kinds_of_adapters_nest_and_merge():
    model = build("gpt2")
    for method in (ia3, lambda m: lora(m, dora=True), bitfit, lambda m: lora(m, modules_to_save=["norm1", "embed"])):
        shaken(method(model), of="trained")
    assert len(adapters_of(model)) == 4
    torch.testing.assert_close(logits_of(merge(copy.deepcopy(model))), logits_of(model), rtol=0, atol=2e-5)
    with pytest.raises(ConfigError, match="peft=bottleneck cannot be merged"):
        merge(bottleneck(model))


def test_the_change_of_a_weight_is_alpha_over_rank_times_the_product():
    model = lora(build("llama"), rank=4, alpha=6.0, rank_pattern={"1.attention.q_proj": 2}, alpha_pattern={"v_proj": 3})
    shaken(model, of="trained")
    first, second = (block.attention for block in model.blocks)
    before = first.q_proj.weight, first.v_proj.weight, second.q_proj.weight
    layers = first.q_proj, first.v_proj, second.q_proj
    merge(model)
    after = first.q_proj.weight, first.v_proj.weight, second.q_proj.weight
    for old, new, layer, factor in zip(before, after, layers, (6 / 4, 3 / 4, 6 / 2), strict=True):
        torch.testing.assert_close(new, old + factor * layer.lora_B @ layer.lora_A, rtol=0, atol=1e-6)
    rslora = lora(build("llama"), rank=4, alpha=6.0, rslora=True)
    assert rslora.blocks[0].attention.q_proj.scaling == 6 / math.sqrt(4)


def test_pissa_starts_at_the_singular_vectors():
    model = build("llama")
    weight = model.blocks[0].attention.o_proj.weight.detach()
    layer = lora(model, rank=5, init="pissa").blocks[0].attention.o_proj
    U, S, V = torch.svd(weight)
    principal = U[:, :5] @ S[:5].diag() @ V[:, :5].T  # Meng et al. 2024, eq. 2
    torch.testing.assert_close(layer.scaling * layer.lora_B @ layer.lora_A, principal, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*")
@pytest.mark.parametrize(
    "way",
    [
        {},
        {"use_dora": True},
        {"init_lora_weights": "pissa"},
        {"lora_dropout": 0.5},
        {"use_dora": True, "lora_dropout": 0.5},
    ],
)
def test_training_follows_the_peft_library(way: dict, tmp_path):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    base = build("llama")
    save_pretrained(base, tmp_path, token_ids={"bos_token_id": None, "eos_token_id": None, "pad_token_id": None})
    names = ["q_proj", "o_proj"]  # which both models call in this order, as the noise of dropout is drawn
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=names, **way)
    theirs = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path), config).train()
    init = "pissa" if "init_lora_weights" in way else "default"
    dropout, dora = way.get("lora_dropout", 0.0), "use_dora" in way
    ours = lora(base, rank=4, alpha=8, dropout=dropout, dora=dora, init=init, target_modules=names).train()
    pairs = [
        (getattr(block.attention, name), getattr(layer.self_attn, name))
        for block, layer in zip(ours.blocks, theirs.base_model.model.model.layers, strict=True)
        for name in names
    ]
    for mine, other in pairs:
        if init == "default":
            other.lora_A["default"].weight.data.copy_(mine.lora_A)
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1) for m in (ours, theirs)]
    for step in range(3):
        torch.manual_seed(step)
        mine = ours(tokens())
        torch.manual_seed(step)
        other = theirs(input_ids=tokens()).logits
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-4 if step else 1e-5)
        for logits, optimizer in zip((mine, other), optimizers, strict=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(logits.flatten(0, 1), tokens().flatten()).backward()
            optimizer.step()
    for mine, other in pairs:
        torch.testing.assert_close(mine.lora_B, other.lora_B["default"].weight, rtol=0, atol=1e-4)
        if dora:
            torch.testing.assert_close(mine.magnitude, other.lora_magnitude_vector["default"].weight, rtol=0, atol=1e-4)


def test_dropout_rests_in_evaluation_and_in_a_model_that_is_evaluated():
    model = shaken(lora(build("gpt2"), dropout=0.5), of="trained")
    assert torch.equal(logits_of(model), logits_of(model))
    model.train()
    assert not torch.equal(logits_of(model), logits_of(model))
    assert not lora(build("gpt2"), dropout=0.5).blocks[0].attention.q_proj.training


def test_half_weights_get_adapters_in_float32():
    model = lora(build("llama").bfloat16(), dora=True)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert logits_of(model).dtype == torch.bfloat16
    train(model)
    assert merge(model).blocks[0].attention.q_proj.weight.dtype == torch.bfloat16
    halves = lora(build("llama"))
    with torch.autocast("cpu", torch.bfloat16):
        assert logits_of(halves).isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "peft.rank must be a whole number above 0, not 0"),
        ({"rank_pattern": {"q_proj": -1}}, "peft.rank must be a whole number above 0, not -1"),
        ({"rank_pattern": {"gate_proj": 2}}, "peft.rank_pattern: no target is called gate_proj"),
        ({"alpha_pattern": {"x": 2}}, "peft.alpha_pattern: no target is called x"),
        ({"alpha": 0}, "peft.alpha must be above 0, not 0"),
        ({"dropout": 1.0}, r"peft.dropout must be in \[0, 1\), not 1.0"),
        ({"init": "zero"}, "peft.init=zero is not one of default, pissa"),
        ({"init": "pissa", "rank": 33}, "peft.rank=33 is more than a weight of 32 x 32 has"),
        ({"modules_to_save": ["head"]}, "no layer with weights is called head; there are: embed, position"),
        ({"modules_to_save": ["q_proj"]}, "q_proj is one of peft.target_modules too"),
    ],
)
def test_a_mistake_is_one_line(options: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        lora(build("gpt2"), **options)


def test_a_merged_model_of_transformers_is_written_with_its_new_weights():
    model = build("wrapped")
    assert isinstance(model, WrappedDecoder)
    merged = merge(shaken(lora(model), of="trained"))
    assert not any("lora" in name for name in merged.inner.state_dict())
