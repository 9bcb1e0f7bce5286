"""Prompts become the batches that a policy answers."""

from collections.abc import Sequence

import torch

from genai_pl.objectives.rows import Collator, Row, pad_rows
from genai_pl.objectives.vocabulary import Vocabulary


class PromptCollator(Collator):
    """input_ids (B, T) padded on the right, the prompts as they are, and the columns of their rows for the reward."""

    def __init__(self, *, vocabulary: Vocabulary, seed: int = 0) -> None:
        self.pad = vocabulary.pad  # and nothing is drawn

    def __call__(self, rows: Sequence[Row]) -> dict[str, object]:
        prompts = [row["prompt_ids"] for row in rows]
        return {
            "input_ids": pad_rows(prompts, self.pad),
            "prompts": prompts,
            "columns": [row["columns"] for row in rows],
            "targets": torch.tensor(float(len(rows))),
        }
