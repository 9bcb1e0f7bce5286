"""Fine-tuning batches predict answers only, whatever the row that an example is packed in."""

import numpy as np
import pytest
import torch

from genai_pl.models import Decoder, ModelConfig
from genai_pl.objectives import IGNORED, CausalLMCollator, SFTCollator, causal_lm_loss
from tests.objectives.packed_rows import PAD, VOCABULARY, row

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


def test_a_model_reads_seq_len_tokens_of_a_row() -> None:
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
