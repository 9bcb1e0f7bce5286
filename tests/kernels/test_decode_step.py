"""The compiled decoding step against the blocks that it stands for, and against the unprepared model in float64."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from genai_pl.kernels import row_products
from genai_pl.kernels.packed_product import products_of
from genai_pl.kernels.row_products import MANY
from genai_pl.models import Decoder, ModelConfig, build_model, fused_decode, prepare_for_decoding
from genai_pl.models.kv_cache import SlotCache

try:
    row_products.library()
except NotImplementedError:
    pytest.skip("no C compiler here", allow_module_level=True)

LLAMA = {"position": "rotary", "norm": "rmsnorm", "gated_mlp": True, "activation": "silu", "bias": False}
GPT2 = {"position": "learned", "norm": "layernorm", "gated_mlp": False, "activation": "gelu_tanh", "bias": True}
KINDS = {
    "llama": {**LLAMA, "n_kv_head": 2},
    "qwen3": {**LLAMA, "qk_norm": True, "n_kv_head": 1, "head_dim": 12},
    "large heads": {**LLAMA, "head_dim": 80, "activation": "gelu"},
    "gpt2": GPT2,
    "layer norms of heads": {**GPT2, "qk_norm": True, "activation": "relu"},
}


def build(**options: object) -> Decoder:
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 4, "n_embd": 32, "vocab_size": 60, "max_seq_len": 600, "init_std": 0.3}
    model = build_model(ModelConfig(**{**sizes, **options})).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:  # norms and biases, which begin as 1 and 0
            nn.init.normal_(parameter, mean=0.7, std=0.3)
    return model


@pytest.fixture(autouse=True)
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Choose the compiled product, whatever a probe finds here."""
    first = lambda model, dtype, rows: products_of(dtype or torch.float32)[0]  # noqa: E731
    monkeypatch.setattr(fused_decode, "_choose_product", first)


def tokens(*shape: int) -> Tensor:
    return torch.randint(0, 60, shape, generator=torch.Generator().manual_seed(1))


def last_states(model: Decoder, ids: Tensor, segments: Tensor | None, steps: int = 3) -> Tensor:
    """Hidden states of the last tokens, decoded one by one after the others."""
    T = ids.shape[1]
    cache = model.new_cache(len(ids), T)
    model.features(ids[:, : T - steps], None if segments is None else segments[:, : T - steps], cache=cache)
    return torch.cat([model.features(ids[:, n : n + 1], cache=cache) for n in range(T - steps, T)], dim=1)


@pytest.mark.parametrize("length", [9, 530], ids=["one chunk of keys", "three chunks"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_step_gives_the_states_of_the_whole(kind: str, length: int) -> None:
    model, exact = build(**KINDS[kind]), build(**KINDS[kind]).double()
    prepare_for_decoding(model)
    assert model.fused.step is not None
    ids = tokens(3, length)
    padded = (torch.arange(length) >= torch.tensor([0, 2, length - 5])[:, None]).long()
    for segments in (None, padded):
        expected = exact.features(ids, segments)[:, -3:]
        torch.testing.assert_close(last_states(model, ids, segments).double(), expected, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("rows", [8, 9, 16, 21])
@torch.no_grad()
def test_steps_of_many_rows_give_the_states_of_the_whole(rows: int) -> None:
    model, exact = build(**KINDS["llama"]), build(**KINDS["llama"]).double()
    prepare_for_decoding(model)
    ids = tokens(rows, 9)
    expected = exact.features(ids)[:, -3:]
    torch.testing.assert_close(last_states(model, ids, None).double(), expected, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8, torch.int4])
@torch.no_grad()
def test_narrow_weights_give_the_states_of_the_blocks(dtype: torch.dtype) -> None:
    model = build(**KINDS["qwen3"])
    prepare_for_decoding(model, dtype)
    ids = tokens(1, 20)
    actual = last_states(model, ids, None)
    model.fused.step = None
    torch.testing.assert_close(actual, last_states(model, ids, None), atol=5e-5, rtol=1e-4)


@torch.no_grad()
def test_the_number_of_threads_changes_no_bit() -> None:
    threads, states = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            model = build(**{**KINDS["llama"], "n_embd": 320, "n_head": 5, "n_kv_head": 5})
            prepare_for_decoding(model)
            assert not model.fused.step.is_small
            torch.set_num_threads(n)
            states.append([last_states(model, tokens(rows, 280), None, steps=1) for rows in (5, 11)])
    finally:
        torch.set_num_threads(threads)
    for few, many in states[1:]:
        assert torch.equal(states[0][0], few)
        assert torch.equal(states[0][1], many)


@torch.no_grad()
def test_sequences_of_a_serving_engine_take_a_step_together() -> None:
    model, plain = build(**KINDS["llama"]), build(**KINDS["llama"])
    prepare_for_decoding(model)
    slots, rows = SlotCache(3), [[1, 2, 3, 4, 5], [7, 8], list(range(30))]
    for row in rows:
        cache = model.new_cache(1, len(row))
        model.features(torch.tensor([row]), cache=cache)
        slots.add_sequence(cache)
    for n in range(2):
        slots.ensure_capacity()
        actual = model.features(torch.tensor([[6 + n], [9 + n], [3 + n]]), cache=slots)
        for row, new, state in zip(rows, (6 + n, 9 + n, 3 + n), actual, strict=True):
            row.append(new)
            torch.testing.assert_close(state[-1], plain.features(torch.tensor([row]))[0, -1], atol=5e-5, rtol=1e-4)


@torch.no_grad()
def test_a_full_cache_is_refused_before_anything_is_written() -> None:
    model = build(**KINDS["llama"])
    prepare_for_decoding(model)
    cache = model.new_cache(1, 4)
    model.features(tokens(1, 4), cache=cache)
    with pytest.raises(ValueError, match="the cache holds 4 tokens, 5 were given"):
        model.features(tokens(1, 1), cache=cache)


@torch.no_grad()
def test_dtypes_and_devices_that_torch_makes_tensors_with_change_nothing() -> None:
    """As `from_pretrained` of transformers sets them meanwhile, in another thread."""
    expected = last_states(build(**KINDS["qwen3"]), tokens(3, 300), None)
    for dtype in (torch.bfloat16, torch.float64):
        model = build(**KINDS["qwen3"])
        try:
            torch.set_default_dtype(dtype)
            prepare_for_decoding(model)
            assert model.new_cache(1, 1).k.dtype is torch.float32
            actual = last_states(model, tokens(3, 300), None)
        finally:
            torch.set_default_dtype(torch.float32)
        torch.testing.assert_close(actual, expected, atol=5e-5, rtol=1e-4)
    cache, ids = model.new_cache(1, 2), tokens(1, 1)
    expected = last_states(model, ids.repeat(1, 2), None, steps=1)
    model.features(ids, cache=cache)
    with torch.device("meta"):
        actual = model.features(ids, cache=cache)
    assert torch.equal(actual, expected)


@torch.no_grad()
def test_a_copy_has_weights_of_its_own() -> None:
    model = build(**KINDS["qwen3"])
    prepare_for_decoding(model)
    expected = last_states(model, tokens(1, 9), None)
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        made.fused.layers[0].norm1.weight.zero_()
        assert not torch.equal(last_states(made, tokens(1, 9), None), expected)
        assert torch.equal(last_states(model, tokens(1, 9), None), expected)


@torch.no_grad()
def test_many_rows_and_other_scores_take_the_blocks() -> None:
    model, plain = build(**KINDS["llama"]), build(**KINDS["llama"])
    prepare_for_decoding(model)
    ids = tokens(MANY + 1, 6)
    torch.testing.assert_close(last_states(model, ids, None), plain.features(ids)[:, -3:], atol=5e-5, rtol=1e-4)
    softcap = build(**LLAMA, softcap=5.0, attention="reference")
    prepare_for_decoding(softcap)
    assert softcap.fused.step is None
