"""Preferences in batches, and the log-probabilities that come out of them."""

import numpy as np
import pytest
import torch

from genai_pl.errors import DataError
from genai_pl.kernels import linear_logprobs
from genai_pl.models import Decoder, ModelConfig
from genai_pl.objectives import (
    IGNORED,
    PreferenceCollator,
    RankingCollator,
    UnpairedPreferenceCollator,
    segment_ends,
    segment_sums,
    sequence_logprobs,
)
from tests.objectives.packed_rows import PAD, VOCABULARY

PAIRED = PreferenceCollator(vocabulary=VOCABULARY)
SHARED = PreferenceCollator(vocabulary=VOCABULARY, share_prompts=True)
UNPAIRED = UnpairedPreferenceCollator(vocabulary=VOCABULARY)
NONE = IGNORED


def text(*ids: int) -> np.ndarray:
    return np.array(ids, np.int32)


def pair(prompt: tuple, chosen: tuple, rejected: tuple) -> dict:
    return {"prompt": text(*prompt), "chosen": text(*chosen), "rejected": text(*rejected), "key": (0, 0)}


def random_text(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.integers(0, 800, n)


@pytest.fixture(scope="module")
def model() -> Decoder:
    torch.manual_seed(0)
    config = ModelConfig(n_layer=2, n_head=2, n_embd=16, vocab_size=VOCABULARY.size, max_seq_len=64)
    return Decoder(config).eval()


def logprob_alone(model: Decoder, prompt: np.ndarray, completion: np.ndarray) -> float:
    """log P(completion | prompt), token by token from full logits."""
    ids = torch.from_numpy(np.concatenate([prompt, completion]))[None]
    logprobs = model(ids)[0].log_softmax(-1)
    return sum(logprobs[t - 1, ids[0, t]].item() for t in range(len(prompt), ids.shape[1]))


def batch_logprobs(model: Decoder, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    hidden = model.features(batch["input_ids"], batch["segment_ids"])
    return linear_logprobs(hidden, model.lm_head.weight, batch["labels"], ignore_index=IGNORED)


def test_a_row_is_prompt_and_chosen_then_prompt_and_rejected() -> None:
    batch = PAIRED([pair((1, 2), (3, 4), (5,)), pair((6,), (7,), (8,))])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 1, 2, 5], [6, 7, 6, 8, PAD, PAD, PAD]]
    assert batch["segment_ids"].tolist() == [[1, 1, 1, 1, 2, 2, 2], [1, 1, 2, 2, 0, 0, 0]]
    assert batch["labels"].tolist() == [[NONE, 3, 4, NONE, NONE, 5, NONE], [7, NONE, 8, NONE, NONE, NONE, NONE]]
    assert batch["targets"] == 2
    assert batch["targets"].dtype == torch.float32
    assert segment_ends(batch["segment_ids"], 2).tolist() == [[3, 6], [1, 3]]
    assert segment_sums(batch["labels"] != IGNORED, batch["segment_ids"], 2).tolist() == [[2, 1], [1, 1]]
    assert {batch[name].dtype for name in ("input_ids", "labels", "segment_ids")} == {torch.int64}


def test_an_empty_completion_has_no_labels_and_one_without_a_prompt_starts_at_its_second_token() -> None:
    batch = PAIRED([pair((1, 2), (), (3,)), pair((), (4, 5), (6,))])
    assert batch["input_ids"].tolist() == [[1, 2, 1, 2, 3], [4, 5, 6, PAD, PAD]]
    assert batch["labels"].tolist() == [[NONE, NONE, NONE, 3, NONE], [5, NONE, NONE, NONE, NONE]]


def test_sums_over_a_packed_batch_are_the_logprobs_of_each_completion_alone(model: Decoder) -> None:
    rng = np.random.default_rng(0)
    rows = []
    for lengths in [(4, 6, 3), (2, 1, 8), (7, 5, 0)]:
        rows.append(dict(zip(("prompt", "chosen", "rejected"), (random_text(rng, n) for n in lengths), strict=True)))
    batch = PAIRED(rows)
    found = segment_sums(batch_logprobs(model, batch), batch["segment_ids"], 2)
    for sums, row in zip(found.tolist(), rows, strict=True):
        expected = [logprob_alone(model, row["prompt"], row[role]) for role in ("chosen", "rejected")]
        assert sums == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_with_a_shared_prompt_a_row_holds_it_once_and_its_last_token_before_each_completion() -> None:
    batch = SHARED([pair((1, 2, 9), (3, 4), (5,)), pair((6,), (7,), (8,)), pair((), (4,), (5,))])
    assert batch["input_ids"].tolist() == [[1, 2, 9, 3, 4, 9, 5], [6, 7, 6, 8, *[PAD] * 3], [4, 5, *[PAD] * 5]]
    assert batch["segment_ids"].tolist() == [[1, 1, 1, 1, 1, 2, 2], [1, 1, 2, 2, 0, 0, 0], [1, 2, 0, 0, 0, 0, 0]]
    assert batch["labels"].tolist()[0] == [NONE, NONE, 3, 4, NONE, 5, NONE]
    assert batch["shared_prompt_len"].tolist() == [2, 0, 0]


SHARING = {
    "gpt": {},
    "llama": {"position": "rotary", "norm": "rmsnorm", "activation": "silu", "gated_mlp": True, "n_kv_head": 1},
    "alibi": {"position": "alibi"},
    "relative": {"position": "relative"},
    "sinusoidal": {"position": "sinusoidal"},
}


@pytest.mark.parametrize("options", SHARING.values(), ids=SHARING)
def test_completions_that_share_their_prompt_have_the_log_probabilities_and_gradients_of_rows_of_their_own(
    options: dict,
) -> None:
    torch.manual_seed(0)
    config = ModelConfig(n_layer=2, n_head=2, n_embd=16, vocab_size=VOCABULARY.size, max_seq_len=24, **options)
    model, rng = Decoder(config), np.random.default_rng(0)
    assert model.supports_shared_prompts
    rows = [
        {"prompt": random_text(rng, n), "completions": [random_text(rng, m) for m in lengths]}
        for n, *lengths in [(9, 6, 3, 4), (1, 1, 8), (4, 0, 2)]
    ]
    batch = RankingCollator(vocabulary=VOCABULARY, share_prompts=True)(rows)
    hidden = model.features(batch["input_ids"], batch["segment_ids"], shared_prompt_len=batch["shared_prompt_len"])
    found = linear_logprobs(hidden, model.lm_head.weight, batch["labels"], ignore_index=IGNORED)
    sums = segment_sums(found, batch["segment_ids"], 3)
    alone = RankingCollator(vocabulary=VOCABULARY)(rows)
    expected = segment_sums(batch_logprobs(model, alone), alone["segment_ids"], 3)
    torch.testing.assert_close(sums, expected, rtol=1e-5, atol=1e-5)
    weights = list(model.parameters())
    gradients = torch.autograd.grad(sums.square().sum(), weights)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected.square().sum(), weights), rtol=1e-4, atol=2e-4)
    assert batch["input_ids"].shape[1] == 9 + 6 + 1 + 3 + 1 + 4 < alone["input_ids"].shape[1]


def test_beginnings_are_not_shared_where_layers_look_at_a_window() -> None:
    config = ModelConfig(n_layer=2, n_head=2, n_embd=16, vocab_size=VOCABULARY.size, max_seq_len=64, window=8)
    assert not Decoder(config).supports_shared_prompts


def test_margins_are_for_all_pairs_or_for_none() -> None:
    rows = [pair((1,), (2,), (3,)), pair((4,), (5,), (6,))]
    assert "margin" not in PAIRED(rows)
    assert PAIRED([{**row, "margin": m} for row, m in zip(rows, (1, 0.5), strict=True)])["margin"].tolist() == [1, 0.5]
    with pytest.raises(DataError, match="1 of 2 rows have a margin"):
        PAIRED([rows[0], {**rows[1], "margin": 1.0}])


def test_unpaired_completions_stand_above_their_prompts_with_the_next_rows_completion() -> None:
    rows = [
        {"prompt": text(1, 2), "completion": text(3), "label": True},
        {"prompt": text(4), "completion": text(5, 6), "label": np.False_},
        {"prompt": text(7), "completion": text(8), "label": 1},
    ]
    batch = UNPAIRED(rows)
    own, mismatched = batch["input_ids"].chunk(2)
    assert own.tolist() == [[1, 2, 3, PAD], [4, 5, 6, PAD], [7, 8, PAD, PAD]]
    assert mismatched.tolist() == [[1, 2, 5, 6], [4, 8, PAD, PAD], [7, 3, PAD, PAD]]
    assert batch["segment_ids"].tolist() == (batch["input_ids"] != PAD).long().tolist()
    assert batch["labels"][:2].tolist() == [[NONE, 3, NONE, NONE], [5, 6, NONE, NONE]]
    assert batch["labels"][3].tolist() == [NONE, 5, 6, NONE]
    assert batch["desirable"].tolist() == [True, False, True]
    assert batch["targets"] == 3


def test_sums_over_an_unpaired_batch_are_the_logprobs_of_each_completion_alone(model: Decoder) -> None:
    rng = np.random.default_rng(1)
    rows = [
        {"prompt": random_text(rng, n), "completion": random_text(rng, m), "label": m > 2}
        for n, m in ((3, 5), (6, 1), (2, 4))
    ]
    batch = UNPAIRED(rows)
    sums, lengths = sequence_logprobs(batch_logprobs(model, batch), batch["labels"] != IGNORED)
    expected = [logprob_alone(model, row["prompt"], row["completion"]) for row in rows]
    expected += [logprob_alone(model, rows[i]["prompt"], rows[(i + 1) % 3]["completion"]) for i in range(3)]
    assert sums.tolist() == pytest.approx(expected, rel=1e-5)
    assert lengths.tolist() == [5, 1, 4, 1, 4, 5]


def test_a_ranking_is_a_row_with_a_segment_for_each_completion() -> None:
    rows = [
        {"prompt": text(1, 2), "completions": [text(3), text(4, 5), text(6)]},
        {"prompt": text(7), "completions": [text(8), text(9)]},
    ]
    batch = RankingCollator(vocabulary=VOCABULARY)(rows)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 1, 2, 4, 5, 1, 2, 6], [7, 8, 7, 9, *[PAD] * 6]]
    assert batch["segment_ids"].tolist() == [[1, 1, 1, 2, 2, 2, 2, 3, 3, 3], [1, 1, 2, 2, *[0] * 6]]
    assert batch["sizes"].tolist() == [3, 2]
    assert batch["targets"].item() == 2
    plain = pair((1, 2), (3, 4), (5,))
    paired = RankingCollator(vocabulary=VOCABULARY)([plain])
    assert paired["input_ids"].tolist() == PAIRED([plain])["input_ids"].tolist()
    assert "sizes" not in paired


def test_what_a_reference_said_before_goes_with_its_pair() -> None:
    rows = [
        {**pair((1,), (2,), (3,)), "reference_logprobs": np.array([-1.0, -2.0], np.float32)},
        {**pair((4,), (5,), (6,)), "reference_logprobs": np.array([-3.0, -4.0], np.float32)},
    ]
    assert PAIRED(rows)["reference_logprobs"].tolist() == [[-1, -2], [-3, -4]]
