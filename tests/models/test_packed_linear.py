"""Packed models: int8, int4 and 16-bit weights give the logits and tokens of a float32 model with the dequantized weights."""

import copy

import pytest
import torch
from torch import Tensor, nn

from genai_pl import peft
from genai_pl.config.generation import GenerationConfig
from genai_pl.errors import ConfigError
from genai_pl.generation import generate
from genai_pl.kernels import row_products
from genai_pl.kernels.int4 import from_int4, to_int4
from genai_pl.kernels.int8 import from_int8, to_int8
from genai_pl.models import ModelConfig, build_model, prepare_for_decoding
from genai_pl.models.experts import ExpertLinear
from genai_pl.models.kv_cache import SlotCache
from genai_pl.models.packed_linear import equalize

SIZES = {"n_layer": 2, "n_head": 4, "n_embd": 32, "vocab_size": 60, "max_seq_len": 32, "init_std": 0.3}
LLAMA = {"position": "rotary", "norm": "rmsnorm", "gated_mlp": True, "activation": "silu", "bias": False}
KINDS = {
    "llama": {**LLAMA, "n_kv_head": 2},
    "qwen3": {**LLAMA, "qk_norm": True, "n_kv_head": 2},
    "gpt2": {"tie_embeddings": False},
    "gemma3": {**LLAMA, "norm_order": "sandwich", "window": 8, "full_every": 2, "tie_embeddings": False},
    "t5": {**LLAMA, "shape": "encoder_decoder", "position": "relative", "n_decoder_layer": 2},
    "bert": {"shape": "encoder", "head": "transform", "n_token_types": 2},
}
DECODERS = ("llama", "qwen3", "gpt2", "gemma3")


@pytest.fixture(autouse=True)
def exact_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep activations of many rows in float32, so that weights alone are rounded."""
    monkeypatch.setattr(row_products, "bf16_products_pay", lambda: False)


def build(kind: str) -> nn.Module:
    torch.manual_seed(0)
    model = build_model(ModelConfig(**{**SIZES, **KINDS[kind]})).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() == 1:  # norms and biases, which begin as 1 and 0
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def rounded(model: nn.Module, dtype: torch.dtype = torch.int8) -> nn.Module:
    """A copy in float64 whose linear layers have the values of codes, and the embedding those of bfloat16."""
    model = copy.deepcopy(model)
    if dtype is torch.int8:
        equalize(model)
    weights = {module: module.weight.clone() for module in model.modules() if isinstance(module, nn.Linear)}
    for module, weight in weights.items():  # a tied head gets a weight of its own
        if dtype is torch.int4 and module is not getattr(model, "lm_head", None):
            module.weight = nn.Parameter(from_int4(to_int4(weight), weight.shape[1]))
        else:
            module.weight = nn.Parameter(from_int8(*to_int8(weight), weight.shape))
    model.embed.weight.data = model.embed.weight.data.bfloat16().float()
    return model.double()


def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    if model.config.shape.value == "encoder_decoder":
        return model(ids, decoder_input_ids=ids[:, :5])
    return model(ids)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int4])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_codes_give_the_logits_of_the_dequantized_model(kind: str, dtype: torch.dtype) -> None:
    model = build(kind)
    expected = rounded(model, dtype)
    prepare_for_decoding(model, dtype)
    assert not [m for m in model.modules() if type(m) is nn.Linear]
    ids = torch.randint(0, 60, (2, 9), generator=torch.Generator().manual_seed(1))
    actual, wanted = logits_of(model, ids), logits_of(expected, ids).float()
    assert actual.dtype == torch.float32
    assert (actual - wanted).abs().max() < 2e-3 * wanted.std()


@pytest.mark.parametrize("options", [LLAMA, {"n_shared_experts": 1, "bias": True}], ids=["gated", "shared and biases"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.int4, torch.bfloat16])
@torch.no_grad()
def test_experts_are_packed_too(dtype: torch.dtype, options: dict) -> None:
    torch.manual_seed(0)
    model = build_model(ModelConfig(**{**SIZES, **options, "n_experts": 4, "experts_per_token": 2})).eval()
    model = model.bfloat16() if dtype is torch.bfloat16 else model
    expected = copy.deepcopy(model).double() if dtype is torch.bfloat16 else rounded(model, dtype)
    for layer, exact in zip(model.modules(), expected.modules(), strict=True):
        if isinstance(layer, ExpertLinear) and dtype is torch.int4:
            exact.weight.copy_(torch.stack([from_int4(to_int4(w), w.shape[1]) for w in layer.weight]))
        elif isinstance(layer, ExpertLinear) and dtype is torch.int8:
            exact.weight.copy_(torch.stack([from_int8(*to_int8(w), w.shape) for w in layer.weight]))
    prepare_for_decoding(model, None if dtype is torch.bfloat16 else dtype)
    assert not [module for module in model.modules() if type(module) in (nn.Linear, ExpertLinear)]
    ids = torch.randint(0, 60, (2, 9), generator=torch.Generator().manual_seed(1))
    actual, wanted = model(ids), expected(ids).float()
    assert (actual - wanted).abs().max() < (0.05 if dtype is torch.bfloat16 else 2e-3) * wanted.std()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_equalizing_leaves_the_function_as_it_is(kind: str) -> None:
    model = build(kind).double()
    ids = torch.randint(0, 60, (2, 9), generator=torch.Generator().manual_seed(1))
    before = logits_of(model, ids)
    equalize(model)
    torch.testing.assert_close(logits_of(model, ids), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", DECODERS)
@torch.no_grad()
def test_int8_decodes_the_tokens_of_the_dequantized_model(kind: str) -> None:
    model = build(kind)
    plain = rounded(model).float()
    prepare_for_decoding(model, torch.int8)
    ids = torch.randint(0, 60, (3, 6), generator=torch.Generator().manual_seed(1))
    segments = (torch.arange(6) >= torch.tensor([0, 2, 4])[:, None]).long()
    config = GenerationConfig(max_new_tokens=20, temperature=0)
    for segment_ids in (None, segments):
        actual = generate(model, ids, config, segment_ids=segment_ids)
        behind = None if segment_ids is None else torch.cat([segment_ids, torch.ones(3, 19, dtype=torch.long)], 1)
        logits = plain(actual[:, :-1], behind)[:, 5:]  # what the reference has for the same text
        chosen = logits.gather(-1, actual[:, 6:, None])[..., 0]
        assert (logits.amax(-1) - chosen).max() < 2e-3 * logits.std()  # its likeliest token, but for near ties
        assert actual[:, 6:].unique().numel() > 5


@pytest.mark.parametrize("kind", DECODERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_16_bits_give_the_logits_of_their_weights_with_float32_beside(kind: str, dtype: torch.dtype) -> None:
    model = build(kind).to(dtype)
    expected = copy.deepcopy(model).double()
    prepare_for_decoding(model, rows=2)
    ids = torch.randint(0, 60, (2, 9), generator=torch.Generator().manual_seed(1))
    cache = model.new_cache(2, 9)
    assert cache.k.dtype == torch.float32
    actual = torch.cat(
        [model(ids[:, :7], cache=cache), model(ids[:, 7:8], cache=cache), model(ids[:, 8:], cache=cache)], 1
    )
    wanted = expected(ids).float()
    assert (actual - wanted).abs().max() < 0.05 * wanted.std()  # activations may have 8 bits, where bfloat16 is faster


@torch.no_grad()
def test_rows_of_a_serving_batch_do_not_depend_on_one_another() -> None:
    model = build("llama")
    prepare_for_decoding(model, torch.int8)
    rows, slots = ([1, 2, 3, 4, 5], [7, 8]), SlotCache(2)
    for row in rows:
        cache = model.new_cache(1, len(row))
        model.features(torch.tensor([row]), cache=cache)
        slots.add_sequence(cache)
    slots.ensure_capacity()
    actual = model.features(torch.tensor([[6], [9]]), cache=slots)
    for n, row in enumerate(rows):
        alone = model.features(torch.tensor([[*row, (6, 9)[n]]]))[0, -1]
        torch.testing.assert_close(actual[n, -1], alone, atol=1e-4, rtol=1e-4)


def test_a_packed_model_is_prepared_once_and_neither_trained_nor_moved() -> None:
    model = build("llama")
    assert prepare_for_decoding(model, torch.int8)
    packed = model.lm_head
    prepare_for_decoding(model)
    assert model.lm_head is packed
    assert model.fused is not None
    assert model.to("cpu") is model
    for change in (lambda: model.to("meta"), lambda: model.bfloat16(), lambda: model.train()):
        with pytest.raises(RuntimeError, match="load it again"):
            change()


REFUSED = {
    "adapter": lambda: peft.lora(build("llama"), rank=2),
    "virtual tokens": lambda: peft.prefix(build("llama"), n_tokens=2),
    "another model": lambda: nn.Sequential(nn.Linear(4, 4)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_packed_is_refused_in_one_line(name: str) -> None:
    model = REFUSED[name]()
    for dtype in ("int8", "int4"):
        with pytest.raises(ConfigError, match=rf"dtype={dtype} takes .*format=merged") as refused:
            prepare_for_decoding(model, getattr(torch, dtype))
        assert "\n" not in str(refused.value)
