"""Prompt and prefix tuning: logits of a text are the same alone, packed, padded, cached and by rows."""

from functools import partial

import pytest
import torch
from peft_models import SHAPES, build, logits, shaken, tokens
from torch import Tensor, nn

from genai_pl.errors import ConfigError
from genai_pl.generation.decode import DecodeState
from genai_pl.models import ModelConfig, build_model
from genai_pl.peft import adapters_disabled, adapters_of, lora, prefix, prompt
from tests.conftest import some

METHODS = {
    "prompt": partial(prompt, n_tokens=3),
    "prefix": partial(prefix, n_tokens=3),
    "prefix, mlp": partial(prefix, n_tokens=3, hidden_size=8),
}
GPT2, LLAMA, BERT, T5 = (SHAPES[name] for name in ("gpt2", "llama", "bert", "t5"))
DECODERS = {
    "learned": GPT2,
    "rotary, grouped keys": LLAMA,
    "alibi": {**GPT2, "position": "alibi"},
    "relative": {**T5, "shape": "decoder"},
    "window, qk-norm": {**LLAMA, "window": 4, "full_every": 2, "qk_norm": True},
    "alibi, window, softcap": {**GPT2, "position": "alibi", "window": 4, "softcap": 2.0},
    "scaled embeddings": {**LLAMA, "scale_embeddings": True},
}
ENCODERS = {
    "bert": BERT,
    "albert": SHAPES["albert"],
    "relative": {**T5, "shape": "encoder"},
    "alibi, window": {**BERT, "position": "alibi", "window": 4},
}
every_method = pytest.mark.parametrize("method", METHODS)
every_decoder = pytest.mark.parametrize("kind", DECODERS)


def adapted(values: dict, method: str, *, std: float = 0.5) -> nn.Module:
    model = shaken(build_model(ModelConfig(**values)))
    return shaken(METHODS[method](model), of="trained", std=std, seed=1)


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-5)


@every_method
@pytest.mark.parametrize(
    "values", [*DECODERS.values(), *ENCODERS.values()], ids=[*DECODERS, *(f"encoder {n}" for n in ENCODERS)]
)
def test_packed_and_padded_documents_are_the_documents_alone(method: str, values: dict):
    model, row = adapted(values, method), tokens()[0]
    segments = torch.tensor([[0] * 2 + [1] * 6 + [2] + [3] * 5 + [0] * 3, [1] * 17])
    packed = model(torch.stack([row, row]), segments)
    for place in (slice(2, 8), slice(8, 9), slice(9, 14)):
        assert_equal(packed[0, place], model(row[None, place])[0])
    assert_equal(packed[1], model(row[None])[0])
    with adapters_disabled(model):
        assert (model(row[None]) - packed[1]).abs().max() > 1e-2


@every_method
@every_decoder
@pytest.mark.parametrize("padded", [False, True])
def test_a_cache_changes_nothing(method: str, kind: str, padded: bool):
    model, input_ids = adapted(DECODERS[kind], method), tokens(3)
    segments = torch.tensor([[0] * 3 + [1] * 14, [1] * 17, [0] + [2] * 16]) if padded else None
    cache, parts = model.new_cache(3, 17), input_ids.split([6, 1, 1, 5, 4], dim=1)
    parts_segments = [None] * 5 if segments is None else segments.split([6, 1, 1, 5, 4], dim=1)
    outputs = torch.cat([model(part, ids, cache=cache) for part, ids in zip(parts, parts_segments, strict=True)], dim=1)
    seen = torch.ones_like(input_ids, dtype=torch.bool) if segments is None else segments > 0
    assert_equal(outputs[seen], model(input_ids, segments)[seen])
    assert (cache.length, cache.n_text, cache.max_length) == (20, 17, 20)
    with pytest.raises(ValueError, match="the cache holds 20 tokens, 21 were given"):
        model(input_ids[:, :1], cache=cache)


@every_method
def test_rows_of_a_cache_can_be_reordered_and_dropped(method: str):
    model, input_ids = adapted(LLAMA, method), tokens(3)
    segments = torch.tensor([[1] * 17, [0, 0] + [1] * 15, [0] + [1] * 16])
    cache = model.new_cache(3, 17)
    model(input_ids[:, :9], segments[:, :9], cache=cache)
    rows = torch.tensor([2, 0, 2, 1])
    cache.keep_rows(rows)
    assert_equal(model(input_ids[rows, 9:], cache=cache), model(input_ids, segments)[rows, 9:])


@every_method
@pytest.mark.parametrize("kind", ["learned", "rotary, grouped keys"])
def test_a_text_longer_than_the_model_reads_goes_on_from_its_last_half(method: str, kind: str):
    model, text = adapted(DECODERS[kind], method), torch.cat([tokens(2)] * 3, dim=1)  # 51 tokens, max_seq_len is 24
    state, lengths = DecodeState(model, 2, 100), []
    for part in text.split([10, *[1] * 41], dim=1):
        outputs = state.forward(part)
        read = state.tokens
        lengths.append(read.shape[1])
        assert_equal(outputs, model(read)[:, -1])
    longest = 21 if kind == "learned" else 24  # learned positions are shared with the virtual tokens
    assert (max(lengths), lengths.count(12)) == (
        longest,
        lengths[: longest - 9].count(12) + lengths[longest - 9 :].count(12),
    )
    assert lengths.count(longest) == 3 if kind == "rotary, grouped keys" else lengths.count(longest) >= 3


@every_method
@pytest.mark.parametrize("kind", DECODERS)
@pytest.mark.parametrize("packed", [False, True])
def test_each_row_of_a_batch_has_the_tokens_or_not(method: str, kind: str, packed: bool):
    model, input_ids = adapted(DECODERS[kind], method), tokens(3)
    segments = torch.tensor([[1] * 17, [0] * 4 + [1] * 6 + [2] * 7, [1] * 9 + [2] * 8]) if packed else None
    expected = model(input_ids, segments)
    with adapters_disabled(model):
        expected[1] = model(input_ids, segments)[1]
    adapters_of(model)[0].rows = torch.tensor([1.0, 0.0, 1.0])
    seen = torch.ones_like(input_ids) if segments is None else segments
    assert_equal(model(input_ids, segments)[seen > 0], expected[seen > 0])
    cache = model.new_cache(3, 17)
    first, rest = (
        model(input_ids[:, p], segments if segments is None else segments[:, p], cache=cache)
        for p in (slice(0, 8), slice(8, 17))
    )
    assert_equal(torch.cat([first, rest], 1)[seen > 0], expected[seen > 0])


@every_method
@torch.no_grad()
def test_a_model_of_transformers_has_them_packed_cached_and_by_rows_too(method: str):
    model, input_ids = shaken(METHODS[method](build("wrapped")), of="trained", std=0.5, seed=1), tokens(3)
    segments = torch.tensor([[1] * 17, [0] * 4 + [1] * 6 + [2] * 7, [1] * 9 + [2] * 8])
    whole = model(input_ids, segments)
    for row, place in ((0, slice(0, 17)), (1, slice(4, 10)), (1, slice(10, 17)), (2, slice(9, 17))):
        assert_equal(whole[row, place], model(input_ids[row : row + 1, place])[0])
    with adapters_disabled(model):
        base = model(input_ids, segments)
        assert (base - whole)[0].abs().max() > 1e-2
    adapters_of(model)[0].rows = torch.tensor([1.0, 0.0, 1.0])
    cache = model.new_cache(3, 17)
    parts = [
        model(ids, part, cache=cache)
        for ids, part in zip(input_ids.split([6, 1, 10], 1), segments.split([6, 1, 10], 1), strict=True)
    ]
    outputs, seen = torch.cat(parts, dim=1), segments > 0
    assert_equal(outputs[seen], torch.stack([whole[0], base[1], whole[2]])[seen])


@every_method
@pytest.mark.parametrize("kind", ["bert", "relative"])
def test_each_row_of_an_encoders_batch_has_the_tokens_or_not(method: str, kind: str):
    model, input_ids = adapted(ENCODERS[kind], method), tokens()
    expected = model(input_ids)
    with adapters_disabled(model):
        expected[1] = model(input_ids)[1]
    adapters_of(model)[0].rows = torch.tensor([1.0, 0.0])
    assert_equal(model(input_ids), expected)


@every_method
@pytest.mark.parametrize("segments", [None, torch.tensor([[1] * 17, [1] * 9 + [2] * 8])], ids=["alone", "packed"])
def test_an_encoder_decoder_reads_and_writes_by_documents_and_rows(method: str, segments: Tensor | None):
    model, ids = adapted(T5, method), tokens()
    outputs = model(ids, segments, decoder_input_ids=ids.flip(1), decoder_segment_ids=segments)
    if segments is not None:
        assert_equal(outputs[1, :9], model(ids[1:, :9], decoder_input_ids=ids.flip(1)[1:, :9])[0])
        assert_equal(outputs[1, 9:], model(ids[1:, 9:], decoder_input_ids=ids.flip(1)[1:, 9:])[0])
    with adapters_disabled(model):
        base = model(ids, segments, decoder_input_ids=ids.flip(1), decoder_segment_ids=segments)
    adapters_of(model)[0].rows = torch.tensor([0.0, 1.0])
    by_rows = model(ids, segments, decoder_input_ids=ids.flip(1), decoder_segment_ids=segments)
    assert_equal(by_rows, torch.stack([base[0], outputs[1]]))


@every_method
def test_a_reader_decodes_what_the_whole_model_says(method: str):
    model, ids = adapted(T5, method), tokens()
    reader = model.encode_source(ids.flip(1))
    cache = reader.new_cache(2, 17)
    parts = [reader.logits(reader.features(part, cache=cache)) for part in ids.split([5, 1, 11], dim=1)]
    assert_equal(torch.cat(parts, 1), logits(model, ids))


@every_method
@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert", "albert", "t5"])
def test_only_the_tokens_are_trained_and_without_them_the_base_is_there_bit_for_bit(method: str, kind: str):
    base, model = build(kind).requires_grad_(False), build(kind)  # torch's kernels differ by what needs a gradient
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model = METHODS[method](model)
    with adapters_disabled(model):
        assert torch.equal(logits(model), logits(base))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == set(model.state_dict()) - set(before)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(3):
        loss = logits(model).log_softmax(-1)[..., 7].mean().neg()
        loss.backward()
        assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    with adapters_disabled(model):
        assert torch.equal(logits(model), logits(base))


@every_method
def test_a_seed_decides_the_first_values(method: str):
    first, same, other = (METHODS[method](build("gpt2"), seed=seed) for seed in (1, 1, 2))
    assert torch.equal(logits(first), logits(same))
    assert not torch.equal(logits(first), logits(other))


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # the compiler looks at it
@every_method
@pytest.mark.parametrize("segments", some([torch.tensor([[1] * 17, [1] * 9 + [2] * 8]), None]), ids=["packed", "alone"])
def test_compiled_blocks_give_the_same(method: str, segments: Tensor | None):
    torch._dynamo.reset()  # other tests have compiled blocks too
    model = adapted(LLAMA, method)
    expected = model(tokens(), segments)
    gradients = torch.autograd.grad(expected.sum(), [p for p in model.parameters() if p.requires_grad])
    for block in model.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    outputs = model(tokens(), segments)
    assert_equal(outputs, expected)
    for ours, theirs in zip(
        torch.autograd.grad(outputs.sum(), [p for p in model.parameters() if p.requires_grad]), gradients, strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@every_method
def test_a_prefix_whose_tokens_see_each_other_begins_with_the_text(method: str):
    model, input_ids = adapted(GPT2, method), tokens()
    length = torch.tensor([5, 9])
    outputs = model(input_ids, prefix=length)
    assert_equal(outputs, model(input_ids, torch.ones_like(input_ids), prefix=length))
    changed = input_ids.clone()
    changed[:, 6] = (changed[:, 6] + 1) % 61
    moved = (model(changed, prefix=length) - outputs).abs().amax(-1) > 1e-4
    assert moved.tolist() == [[False] * 6 + [True] * 11, [True] * 17]


@every_method
def test_another_adapter_may_wrap_the_layers(method: str):
    model = shaken(lora(METHODS[method](build("llama"))), of="trained", seed=2)
    input_ids, cache = tokens(), model.new_cache(2, 17)
    outputs = torch.cat([model(part, cache=cache) for part in input_ids.split([5, 12], 1)], 1)
    assert_equal(outputs, model(input_ids))
    assert [adapter.method for adapter in adapters_of(model)] in (
        ["lora", "prompt"],
        ["lora", "prefix"],
        ["prompt", "lora"],
        ["prefix", "lora"],
    )


@every_method
def test_a_weight_between_0_and_1_is_refused(method: str):
    model = METHODS[method](build("gpt2"))
    (adapter,) = adapters_of(model)
    adapter.weight = 0.5
    with pytest.raises(ConfigError, match="must be 0 or 1"):
        model(tokens())
    adapter.weight, adapter.rows = 1.0, torch.tensor([0.5, 1.0])
    with pytest.raises(ConfigError, match="must be 0 or 1"):
        model(tokens())


@pytest.mark.parametrize("method", [prompt, prefix])
@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("reformer", {}, "needs model.attention_kind=full, not reformer"),
        ("xlnet", {}, "no place for its tokens in model.position=xl"),
        ("gpt2", {"n_tokens": 24}, r"at least 1 and below model.max_seq_len \(24\)"),
        ("llama", {"n_tokens": 0}, "at least 1, not 0"),
    ],
)
def test_what_cannot_be_is_one_line(method, kind: str, options: dict, message: str):
    with pytest.raises(ConfigError, match=message) as error:
        method(build(kind), **options)
    assert "\n" not in str(error.value)


def test_a_model_has_virtual_tokens_of_one_kind():
    with pytest.raises(ConfigError, match="peft=prefix: this model has virtual tokens of peft=prompt already"):
        prefix(prompt(build("gpt2"), n_tokens=2), n_tokens=2)
