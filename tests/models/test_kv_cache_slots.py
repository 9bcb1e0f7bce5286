"""SlotCache: sequences that come and go give the logits that each gives alone, with every kind of positions."""

import random

import pytest
import torch
from torch import Tensor

from genai_pl.models import Decoder, ModelConfig, kv_cache
from genai_pl.models.kv_cache import SlotCache

SHAPES = {
    "gpt2": {"position": "learned", "norm": "layernorm", "bias": True},
    "llama": {"position": "rotary", "norm": "rmsnorm", "gated_mlp": True, "n_kv_head": 2},
    "windows": {"position": "rotary", "window": 5, "full_every": 2, "qk_norm": True, "rope_theta_local": 100.0},
    "alibi": {"position": "alibi"},
    "relative": {"position": "relative"},
    "sinusoidal": {"position": "sinusoidal"},
    "softcap": {"position": "rotary", "softcap": 5.0},
}


def build(**options: object) -> Decoder:
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 4, "n_embd": 32, "vocab_size": 60, "max_seq_len": 48, "init_std": 0.3}
    return Decoder(ModelConfig(**{**sizes, **options})).eval()


def alone(model: Decoder, row: list[int]) -> Tensor:
    """The logits after a sequence, in one pass and without a cache."""
    return model(torch.tensor([row]))[0, -1]


@pytest.mark.parametrize("shape", SHAPES)
@torch.inference_mode()
def test_rows_that_come_and_go_are_read_as_each_alone(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache, "SPARE", 3)  # so that rows move, and buffers grow, all the time
    model, draw = build(**SHAPES[shape]), random.Random(0)
    cache, rows, worst, n_moves = SlotCache(4), [], 0.0, 0
    for _ in range(70):
        if len(rows) < 4 and draw.random() < 0.4:
            row = [draw.randrange(60) for _ in range(draw.randint(1, 30))]
            own = model.new_cache(1, len(row))
            model(torch.tensor([row]), cache=own)
            assert cache.add_sequence(own) == len(rows)
            rows.append(row)
        over = [n for n, row in enumerate(rows) if len(row) == 47 or draw.random() < 0.04]
        for n in reversed(over):
            cache.remove_sequence(n)
            rows[n] = rows[-1]
            rows.pop()
        if not rows:
            continue
        before = cache.next_column
        cache.ensure_capacity()
        n_moves += cache.next_column != before
        for row in rows:
            row.append(draw.randrange(60))
        logits = model(torch.tensor([[row[-1]] for row in rows]), cache=cache)[:, -1]
        assert cache.n_text == max(map(len, rows))
        worst = max(worst, (logits - torch.stack([alone(model, row) for row in rows])).abs().max().item())
    assert n_moves > 0
    assert worst < 1e-4


@torch.inference_mode()
def test_a_longer_row_moves_those_that_are_there() -> None:
    model, cache = build(position="learned"), SlotCache(2)
    rows = [[1, 2, 3], list(range(40))]
    for row in rows:
        own = model.new_cache(1, len(row))
        model(torch.tensor([row]), cache=own)
        cache.add_sequence(own)
    logits = model(torch.tensor([[5], [6]]), cache=cache)[:, -1]
    torch.testing.assert_close(logits, torch.stack([alone(model, [*rows[0], 5]), alone(model, [*rows[1], 6])]))


@torch.inference_mode()
def test_rows_of_one_length_need_no_segments() -> None:
    model, cache = build(), SlotCache(2)
    for _ in range(2):
        own = model.new_cache(1, 3)
        model(torch.tensor([[1, 2, 3]]), cache=own)
        cache.add_sequence(own)
    assert cache.segments(None, 1) is None


@torch.inference_mode()
def test_a_row_that_was_no_number_leaves_nothing_to_the_next_one() -> None:
    model, cache = build(), SlotCache(2)
    poison = model.new_cache(1, 30)
    model(torch.arange(30)[None], cache=poison)
    poison.k.fill_(float("nan"))
    poison.v.fill_(float("nan"))
    keeper = model.new_cache(1, 30)
    model(torch.arange(30)[None], cache=keeper)
    cache.add_sequence(keeper)
    cache.add_sequence(poison)
    cache.remove_sequence(1, clean=True)
    short = model.new_cache(1, 2)
    model(torch.tensor([[1, 2]]), cache=short)
    cache.add_sequence(short)
    logits = model(torch.tensor([[4], [3]]), cache=cache)[:, -1]
    torch.testing.assert_close(logits[1], alone(model, [1, 2, 3]))


def test_more_rows_than_slots_are_refused() -> None:
    model, cache = build(), SlotCache(1)
    own = model.new_cache(1, 2)
    with torch.inference_mode():
        model(torch.tensor([[1, 2]]), cache=own)
        cache.add_sequence(own)
        with pytest.raises(ValueError, match="all 1 slots are taken"):
            cache.add_sequence(own)
