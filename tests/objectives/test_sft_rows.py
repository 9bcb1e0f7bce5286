"""Fine-tuning batches predict answers only, and examples are packed into rows that are all but full."""

import numpy as np
import pytest
import torch
from packed_rows import PAD, VOCABULARY, row

from genai_pl.models import Decoder, ModelConfig
from genai_pl.objectives import IGNORED, CausalLMCollator, SFTCollator, causal_lm_loss, pack

COLLATE = SFTCollator(vocabulary=VOCABULARY)


def answered(ids: list[int], loss_mask: list[int], segments: list[int]) -> dict[str, np.ndarray]:
    return {
        "input_ids": np.array(ids, np.int32),
        "segment_ids": np.array(segments),
        "loss_mask": np.array(loss_mask, bool),
        "key": (0, 0),
    }


def test_a_position_predicts_the_next_token_if_that_is_an_answer() -> None:
    batch = COLLATE([answered([1, 2, 3, 4, 5, 6, 7], [0, 0, 1, 1, 0, 1, 1], [1, 1, 1, 1, 1, 1, 1])])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6]]
    assert batch["labels"].tolist() == [[IGNORED, 3, 4, IGNORED, 6, 7]]
    assert batch["targets"] == 4
    assert batch["targets"].dtype == torch.float32
    assert "segment_ids" not in batch


def test_an_answer_at_the_start_of_an_example_is_not_predicted_from_the_one_before() -> None:
    batch = COLLATE(
        [
            answered([1, 2, 3, 4, 5], [1, 1, 1, 1, 1], [1, 1, 2, 2, 2]),
            answered([6, 7], [0, 1], [1, 1]),
            answered([8], [1], [1]),
        ]
    )
    assert batch["labels"].tolist() == [[2, IGNORED, 4, 5], [7] + 3 * [IGNORED], 4 * [IGNORED]]
    assert batch["segment_ids"].tolist() == [[1, 1, 2, 2], [1, 1, 0, 0], [1, 0, 0, 0]]
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4], [6, 7, PAD, PAD], [8, PAD, PAD, PAD]]
    assert batch["targets"] == 4


def test_with_all_tokens_learned_it_is_causal_language_modelling() -> None:
    full = [{**row(33, index, documents=(9, 14)), "loss_mask": np.ones(33, bool)} for index in range(3)]
    ours, expected = COLLATE(full), CausalLMCollator(vocabulary=VOCABULARY)(full)
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


def test_a_model_reads_seq_len_tokens_of_rows_that_do_not_overlap() -> None:
    assert COLLATE.overlap == 0
    length = COLLATE.row_length(32)
    batch = COLLATE([{**row(length), "loss_mask": np.ones(length, bool)}])
    assert batch["input_ids"].shape == (1, 32)


def test_examples_cost_the_same_packed_and_alone() -> None:
    torch.manual_seed(0)
    model = Decoder(ModelConfig(n_layer=2, n_head=2, n_embd=16, vocab_size=VOCABULARY.size, max_seq_len=64)).eval()
    rng = np.random.default_rng(0)
    examples = []
    for n in (5, 9, 7):
        examples.append(answered(rng.integers(0, 800, n).tolist(), (rng.random(n) < 0.6).tolist(), [1] * n))
    packed = {name: np.concatenate([e[name] for e in examples]) for name in ("input_ids", "loss_mask")}
    packed["segment_ids"] = np.repeat([1, 2, 3], (5, 9, 7))

    def loss(rows: list) -> tuple[float, float]:
        batch = COLLATE(rows)
        hidden = model.features(batch["input_ids"], batch.get("segment_ids"))
        return causal_lm_loss(hidden, model.lm_head.weight, batch["labels"]).item(), batch["targets"].item()

    alone = [loss([example]) for example in examples]
    together = loss([packed])
    assert together[1] == sum(n for _, n in alone)
    assert together[0] == pytest.approx(sum(value for value, _ in alone), rel=1e-5)
    assert loss(examples)[0] == pytest.approx(together[0], rel=1e-5)


def chat_lengths(n: int, room: int, *, median: float, spread: float) -> np.ndarray:
    """Log-normal, as lengths of conversations are, and cut to the room."""
    lengths = np.random.default_rng(n).lognormal(np.log(median), spread, n)
    return np.clip(lengths.astype(np.int64), 4, room)


def best_fit(lengths: list[int], room: int) -> list[list[int]]:
    """Best-fit decreasing in quadratic time; which of equally full rows is taken does not matter to their number."""
    bins: list[list[int]] = []
    left: list[int] = []
    for example in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = [b for b in range(len(bins)) if left[b] >= lengths[example]]
        if not fitting:
            bins.append([])
            left.append(room)
            fitting = [len(bins) - 1]
        target = min(fitting, key=left.__getitem__)
        bins[target].append(example)
        left[target] -= lengths[example]
    return bins


@pytest.mark.parametrize(("median", "spread"), [(150, 0.8), (500, 1.0), (60, 0.5), (900, 1.2)])
@pytest.mark.parametrize("room", [1025, 2049])
def test_rows_hold_every_example_once_and_at_least_97_percent_text(median: float, spread: float, room: int) -> None:
    lengths = chat_lengths(20_000, room, median=median, spread=spread)
    bins = pack(lengths, room)
    assert sorted(example for examples in bins for example in examples) == list(range(len(lengths)))
    totals = [lengths[examples].sum() for examples in bins]
    assert max(totals) <= room
    assert sum(totals) / (len(bins) * room) >= 0.97
    assert bins == pack(lengths.tolist(), room)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("longest", [32, 15])
def test_packing_fills_rows_as_best_fit_decreasing_does(seed: int, longest: int) -> None:
    lengths = np.random.default_rng(seed).integers(3, longest + 1, 200).tolist()

    def totals(bins: list[list[int]]) -> list[int]:
        return sorted(sum(lengths[i] for i in examples) for examples in bins)

    assert totals(pack(lengths, 32)) == totals(best_fit(lengths, 32))


def test_packing_of_few_examples() -> None:
    assert pack([], 8) == []
    assert pack([8], 8) == [[0]]
    assert pack([3, 5, 8, 5], 8) == [[2], [1], [3, 0]]
    assert pack([1] * 9, 4) == [[0, 1, 2, 3], [4, 5, 6, 7], [8]]
    for impossible in ([0], [9], [-1]):
        with pytest.raises(AssertionError):
            pack(impossible, 8)


@pytest.mark.slow
def test_a_million_examples_are_packed_in_seconds() -> None:
    import time

    lengths = chat_lengths(1_000_000, 8192, median=600, spread=1.0)
    start = time.perf_counter()
    bins = pack(lengths, 8192)
    assert time.perf_counter() - start < 20
    assert lengths.sum() / (len(bins) * 8192) > 0.99
