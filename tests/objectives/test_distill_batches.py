"""Batches of distillation: prompts for the student, and rows of data and completions joined."""

import numpy as np
import torch

from genai_pl.objectives.distillation import DistillCollator, join_batches, prompts_of_row
from genai_pl.objectives.special_tokens import SpecialTokens


def row(n: int, *, segments: list[int], mask: list[int] | None = None) -> dict:
    ids = np.arange(len(segments)) + 10 * n
    values = {"input_ids": ids, "segment_ids": np.array(segments), "key": (0, n)}
    return values if mask is None else {**values, "loss_mask": np.array(mask, bool)}


def batch_of(*rows: dict, fraction: float = 0.0) -> dict[str, torch.Tensor]:
    return DistillCollator(vocabulary=SpecialTokens(size=100), seed=1, student_fraction=fraction)(rows)


def test_a_conversation_is_answered_at_its_first_answer_and_a_text_is_continued() -> None:
    talks = row(1, segments=[1] * 6 + [2] * 5 + [3] * 3, mask=[0, 0, 0, 1, 1, 0, 0, 0, 1, 1, 1, 0, 0, 0])
    batch = batch_of(talks)
    segments = batch.get("segment_ids", torch.ones_like(batch["input_ids"]))
    prompts = prompts_of_row(batch["input_ids"][0], batch["labels"][0], segments[0], text_tokens=4)
    assert [prompt.tolist() for prompt in prompts] == [[10, 11, 12], [16, 17]]  # the third has no answer
    text = batch_of(row(2, segments=[1] * 9 + [2] * 3))
    prompts = prompts_of_row(text["input_ids"][0], text["labels"][0], text["segment_ids"][0], text_tokens=4)
    assert [prompt.tolist() for prompt in prompts] == [[20, 21, 22, 23]]  # the second is too short


def test_what_is_drawn_belongs_to_a_row_and_not_to_its_batch() -> None:
    rows = [row(n, segments=[1] * 4) for n in range(200)]
    together = batch_of(*rows, fraction=0.3)["on_policy"]
    apart = torch.cat([batch_of(one, fraction=0.3)["on_policy"] for one in rows])
    assert torch.equal(together, apart)
    assert 35 < together.sum() < 85  # 60 expected, deviation 6.5
    assert not batch_of(*rows)["on_policy"].any()
    assert batch_of(*rows, fraction=1.0)["on_policy"].all()
    assert batch_of(*rows)["rows"].tolist() == list(range(200))


def test_rows_are_filled_to_the_longer_ones() -> None:
    first = {name: torch.ones(1, 3, dtype=torch.long) for name in ("input_ids", "labels", "segment_ids")}
    second = {name: torch.ones(2, 5, dtype=torch.long) for name in first}
    joined = join_batches(first, second, pad=7)
    assert joined["input_ids"].tolist() == [[1, 1, 1, 7, 7], [1] * 5, [1] * 5]
    assert joined["labels"][0].tolist() == [1, 1, 1, -100, -100]
    assert joined["segment_ids"][0].tolist() == [1, 1, 1, 0, 0]
