"""A packed, padded or cached row gives what the same text gives alone, in every kind of model."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from genai_pl.errors import ConfigError
from genai_pl.models import Decoder, ModelConfig

SIZES = {"n_layer": 2, "n_head": 4, "n_embd": 32, "vocab_size": 53, "max_seq_len": 24}
MODERN = {**SIZES, "position": "rotary", "norm": "rmsnorm", "activation": "silu", "gated_mlp": True, "bias": False}
KINDS = {
    "learned": SIZES,
    "sinusoidal, post-norm": {**SIZES, "position": "sinusoidal", "norm_order": "post", "activation": "relu"},
    "rotary, grouped keys": {**MODERN, "n_kv_head": 2},
    "alibi": {**SIZES, "position": "alibi"},
    "window": {**MODERN, "window": 3, "qk_norm": True, "n_kv_head": 1},
    "alibi, window": {**SIZES, "position": "alibi", "window": 4},
    "softcaps": {**MODERN, "softcap": 2.0, "logit_softcap": 3.0},
}
every_kind = pytest.mark.parametrize("values", KINDS.values(), ids=KINDS)


def build(values: dict) -> Decoder:
    """A model whose parameters are all drawn from one distribution, wide enough for every path to matter."""
    model = Decoder(ModelConfig(**values)).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return model.requires_grad_(False)


def tokens(*size: int) -> Tensor:
    return torch.randint(53, size, generator=torch.Generator().manual_seed(1))


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-5)


@every_kind
def test_packed_documents_are_the_documents_alone(values: dict):
    model, (first, second, third) = build(values), (tokens(n, 1)[:, 0] for n in (7, 1, 9))
    row = torch.cat([first, second, third, torch.zeros(3, dtype=torch.long)])
    segments = torch.tensor([1] * 7 + [2] + [3] * 9 + [0] * 3)
    other = torch.ones_like(row)  # a row without borders, in the same batch
    logits = model(torch.stack([row, row]), torch.stack([segments, other]))
    for document, place in ((first, slice(0, 7)), (second, slice(7, 8)), (third, slice(8, 17))):
        assert_equal(logits[0, place], model(document[None])[0])
    assert_equal(logits[1], model(row[None])[0])


@every_kind
def test_rows_padded_on_the_left_are_the_rows_alone(values: dict):
    model, row = build(values), tokens(9)
    padded = torch.cat([torch.zeros(4, dtype=torch.long), row])[None]
    segments = torch.tensor([[0] * 4 + [1] * 9])
    assert_equal(model(padded, segments)[0, 4:], model(row[None])[0])


@every_kind
@pytest.mark.parametrize("steps", [[1] * 12, [5, 1, 1, 4, 1]], ids=["one by one", "prefill and chunks"])
def test_a_cache_changes_nothing(values: dict, steps: list[int]):
    model, input_ids = build(values), tokens(2, 12)
    cache = model.new_cache(2, 16)
    logits = torch.cat([model(part, cache=cache) for part in input_ids.split(steps, dim=1)], dim=1)
    assert_equal(logits, model(input_ids))
    assert cache.length == 12


@every_kind
@pytest.mark.parametrize("given", [True, False], ids=["segments at every step", "segments of the prompt only"])
def test_a_cache_changes_nothing_for_padded_prompts(values: dict, given: bool):
    model, input_ids = build(values), tokens(3, 12)
    segments = torch.tensor([[0] * 3 + [1] * 9, [1] * 12, [0] + [2] * 11])
    cache = model.new_cache(3, 12)
    steps = [6, 1, 3, 2]
    parts = zip(input_ids.split(steps, dim=1), segments.split(steps, dim=1), strict=True)
    logits = [model(ids, ids_of if given or n == 0 else None, cache=cache) for n, (ids, ids_of) in enumerate(parts)]
    seen = segments > 0
    assert_equal(torch.cat(logits, dim=1)[seen], model(input_ids, segments)[seen])


def test_padding_may_begin_after_unpadded_tokens_are_cached():
    model, input_ids = build(KINDS["learned"]), tokens(2, 6)
    segments = torch.tensor([[1, 1, 1, 2, 2, 2], [1] * 6])
    cache = model.new_cache(2, 6)
    logits = torch.cat([model(input_ids[:, :3], cache=cache), model(input_ids[:, 3:], segments[:, 3:], cache=cache)], 1)
    assert_equal(logits, model(input_ids, segments))


def test_rows_of_a_cache_can_be_reordered_and_dropped():
    model, input_ids = build(KINDS["rotary, grouped keys"]), tokens(3, 8)
    segments = torch.tensor([[1] * 8, [0, 0] + [1] * 6, [0] + [1] * 7])
    cache = model.new_cache(3, 8)
    model(input_ids[:, :5], segments[:, :5], cache=cache)
    rows = torch.tensor([2, 0, 2, 1])
    cache.keep_rows(rows)
    assert_equal(model(input_ids[rows, 5:], cache=cache), model(input_ids, segments)[rows, 5:])


def test_a_full_cache_refuses_more():
    model = build(KINDS["rotary, grouped keys"])
    for segments in (None, torch.ones(1, 5, dtype=torch.long)):
        with pytest.raises(ValueError, match="the cache holds 4 tokens, 5 were given"):
            model(tokens(1, 5), segments, cache=model.new_cache(1, 4))


@every_kind
def test_a_later_token_changes_nothing_before_it(values: dict):
    model, input_ids = build(values), tokens(1, 12)
    changed = input_ids.clone()
    changed[0, 7] = (changed[0, 7] + 1) % 53
    before, after = model(input_ids), model(changed)
    assert torch.equal(before[:, :7], after[:, :7])
    assert (before[:, 7:] - after[:, 7:]).abs().amax(-1).min() > 1e-4 or values.get("window")


def test_a_window_sees_that_many_tokens_itself_included():
    model, input_ids = build({**MODERN, "n_layer": 1, "window": 3}), tokens(1, 8)
    changed = input_ids.clone()
    changed[0, 2] = (changed[0, 2] + 1) % 53
    differs = (model(input_ids) - model(changed)).abs().amax(-1)[0] > 1e-6
    assert differs.tolist() == [False, False, True, True, True, False, False, False]


@every_kind
def test_backends_agree(values: dict):
    reference = build({**values, "attention": "reference"})
    segments = torch.tensor([[1] * 5 + [2] * 6, [0] * 2 + [1] * 9])
    seen = segments > 0
    assert_equal(build(values)(tokens(2, 11), segments)[seen], reference(tokens(2, 11), segments)[seen])


def test_learned_positions_end_where_the_configuration_says():
    model = build(SIZES)
    assert model(tokens(1, 24)).shape == (1, 24, 53)
    with pytest.raises(ConfigError, match=r"25 tokens are more than model.max_seq_len \(24\)"):
        model(tokens(1, 25))
    cache = model.new_cache(1, 30)
    model(tokens(1, 24), cache=cache)
    with pytest.raises(ConfigError, match=r"25 tokens are more than model.max_seq_len"):
        model(tokens(1, 1), cache=cache)
    assert build(MODERN)(tokens(1, 40)).shape == (1, 40, 53)


def test_features_and_logits_are_the_two_halves_of_forward():
    model, input_ids = build(KINDS["softcaps"]), tokens(2, 5)
    hidden = model.features(input_ids)
    assert hidden.shape == (2, 5, 32)
    assert torch.equal(model.logits(hidden), model(input_ids))
    assert model(input_ids).abs().max() < 3


def test_dropout_acts_in_training_only():
    model, input_ids = build({**SIZES, "dropout": 0.5}), tokens(1, 6)
    without = build(SIZES)(input_ids)
    assert torch.equal(model(input_ids), without)
    model.train()
    assert not torch.equal(model(input_ids), model(input_ids))
    for block in model.blocks:  # the attention weights' own dropout
        block.dropout.p = model.dropout.p = 0.0
    assert not torch.equal(model(input_ids), without)


@pytest.mark.parametrize("order", ["pre", "post"])
def test_dropout_acts_on_the_embeddings_and_before_every_residual_sum(order: str):
    model, places = Decoder(ModelConfig(**SIZES, norm_order=order, dropout=0.5)), []
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout):
            module.register_forward_hook(lambda *_, name=name: places.append(name))
    model(tokens(1, 6))
    assert places == ["dropout", *["blocks.0.dropout"] * 2, *["blocks.1.dropout"] * 2]


def test_a_model_is_built_on_the_meta_device_and_filled_later():
    config = ModelConfig(**MODERN)
    with torch.device("meta"):
        model = Decoder(config)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    model.to_empty(device="cpu")
    model.load_state_dict(build(MODERN).state_dict())
    model.tie_weights()
    assert_equal(model.eval()(tokens(1, 6)), build(MODERN)(tokens(1, 6)))


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_are_one_tensor(tied: bool):
    model = Decoder(ModelConfig(**SIZES, tie_embeddings=tied))
    assert (model.lm_head.weight is model.embed.weight) == tied


def test_a_vocabulary_of_unknown_size_is_an_error_that_names_the_option():
    config = dataclasses.replace(ModelConfig(**SIZES), vocab_size=None)
    with pytest.raises(ConfigError, match=r"model.vocab_size is not known"):
        Decoder(config)


def test_autocast_reaches_the_cache():
    model, input_ids = build({**MODERN, "qk_norm": True}), tokens(1, 6)
    with torch.autocast("cpu", torch.bfloat16):
        cache = model.new_cache(1, 6)
        logits = torch.cat([model(part, cache=cache) for part in input_ids.split(2, dim=1)], dim=1)
        whole = model(input_ids)
    assert cache.k.dtype is torch.bfloat16
    torch.testing.assert_close(logits, whole, rtol=0.05, atol=0.1)


def test_documents_of_a_row_may_be_longer_together_than_learned_positions_reach():
    torch.manual_seed(0)
    model = Decoder(ModelConfig(n_layer=1, n_head=2, n_embd=16, vocab_size=20, max_seq_len=6)).eval()
    ids = torch.arange(10)[None]
    together = model(ids, torch.tensor([[1] * 6 + [2] * 4]))
    alone = torch.cat([model(ids[:, :6]), model(ids[:, 6:])], dim=1)
    torch.testing.assert_close(together, alone)
    with pytest.raises(ConfigError, match="10 tokens are more"):
        model(ids)
    with pytest.raises(ConfigError, match="7 tokens are more"):
        model(ids, torch.tensor([[1] * 7 + [2] * 3]))
