"""Collation of prompts for the policy to answer."""

from collections.abc import Sequence

import torch

from genai_pl.errors import ConfigError
from genai_pl.objectives.collate import Collator, Example, pad_rows
from genai_pl.objectives.special_tokens import SpecialTokens


class PromptCollator(Collator):
    """input_ids (B, T) padded on the right, the prompts as texts or messages, the columns of their rows for the reward, and
    `rows` (B,), their numbers in the data.

    max_new_tokens: tokens of a completion, which a row reserves.
    Examples are {"prompt_ids": ids, "prompt": the text or messages, "columns": all columns}.
    """

    def __init__(self, *, vocabulary: SpecialTokens, max_new_tokens: int, seed: int = 0) -> None:
        self.pad, self.max_new_tokens = vocabulary.pad, max_new_tokens  # and nothing is drawn
        self.seq_len: int | None = None  # of a prompt with its completions, once the data are prepared

    def row_length(self, seq_len: int) -> int:
        """The tokens of a prompt at most, so that it and its completion fit into seq_len."""
        self.seq_len = seq_len
        if self.max_new_tokens >= seq_len:
            raise ConfigError(
                f"objective.max_new_tokens={self.max_new_tokens} leaves no room for a prompt in {seq_len} tokens "
                "(data.seq_len, model.max_seq_len)"
            )
        return seq_len - self.max_new_tokens

    def __call__(self, rows: Sequence[Example]) -> dict[str, object]:
        prompts = [row["prompt_ids"] for row in rows]
        return {
            "input_ids": pad_rows(prompts, self.pad),
            "prompts": prompts,
            "raw_prompts": [row["prompt"] for row in rows],
            "columns": [row["columns"] for row in rows],
            "rows": torch.tensor([row["key"][1] if "key" in row else -1 for row in rows]),
            "targets": torch.tensor(float(len(rows))),
        }
