"""Collation of preferences: two completions of a prompt, a ranking, or one completion that was liked or not."""

from collections.abc import Sequence

import numpy as np
import torch

from genai_pl.errors import DataError
from genai_pl.objectives.collate import Batch, Collator, pad_rows
from genai_pl.objectives.special_tokens import SpecialTokens
from genai_pl.objectives.token_loss import IGNORED

Example = dict[str, np.ndarray]  # token ids by role
Group = tuple[np.ndarray, Sequence[np.ndarray]]  # a prompt and its completions


class PreferenceCollator(Collator):
    """One row for each pair, prompt and chosen as segment 1, prompt and rejected as segment 2; targets are the pairs.

    Examples are {"prompt": ids, "chosen": ids, "rejected": ids}, and a "margin" for all or for none; "chosen_mask" and
    "rejected_mask" are False for tokens that do not count, those of tools. Only tokens of
    completions are labels, so `segment_sums(logprobs, segment_ids, 2)` are log-probabilities of completions. The last
    token of a segment predicts nothing; a reward model reads its score there (`segment_ends`). A "reference" (2,) of
    precomputed log-probabilities is passed on.

    share_prompts: a row holds its prompt once. All but the last token of it are the `shared` (B,) beginning of every
        segment, and only the first segment has them.
    likelihood: whose tokens are counted as `tokens`: those of chosen completions ("chosen"), or of prompts too ("whole").
    """

    ranks = False  # whether rows may have more than two completions

    def __init__(
        self, *, vocabulary: SpecialTokens, seed: int = 0, share_prompts: bool = False, likelihood: str | None = None
    ) -> None:
        self.pad = vocabulary.pad  # and nothing is drawn
        self.share_prompts, self.likelihood = share_prompts, likelihood

    def __call__(self, rows: Sequence[Example]) -> Batch:
        batch = self.compared([(row["prompt"], [row["chosen"], row["rejected"]]) for row in rows])
        _ignore(batch, [(row[role], row.get(f"{role}_mask")) for row in rows for role in ("chosen", "rejected")])
        margins = [float(row["margin"]) for row in rows if "margin" in row]
        if len(margins) not in (0, len(rows)):
            raise DataError(f"pairs: {len(margins)} of {len(rows)} rows have a margin; give one to all or to none")
        batch |= {"margin": torch.tensor(margins)} if margins else {}
        if "reference_logprobs" in rows[0]:  # precomputed log-probabilities
            batch["reference_logprobs"] = torch.from_numpy(np.stack([row["reference_logprobs"] for row in rows]))
        if self.likelihood:
            labels = batch["labels"] if self.likelihood == "chosen" else text_labels(batch)
            batch["tokens"] = ((labels != IGNORED) & (batch["segment_ids"] == 1)).sum().float()
        return {**batch, "targets": _count(rows)}

    def compared(self, rows: Sequence[Group]) -> Batch:
        """The batch of prompts with their completions."""
        return groups_batch(rows, self.pad, share_prompts=self.share_prompts)


class RankingCollator(PreferenceCollator):
    """Pairs, or one row for each prompt with its completions as segments 1, 2, ..., the best first, and `sizes` (B,).

    Rows are pairs, or {"prompt": ids, "completions": [ids, ids, ...]}.
    """

    ranks = True

    def __call__(self, rows: Sequence[Example]) -> Batch:
        if "completions" not in rows[0]:
            return super().__call__(rows)
        batch = self.compared([(row["prompt"], row["completions"]) for row in rows])
        sizes = torch.tensor([len(row["completions"]) for row in rows])
        return {**batch, "sizes": sizes, "targets": _count(rows)}


class UnpairedPreferenceCollator(Collator):
    """Prompts and completions (B, T), then the prompts again with the completion of the next row: (2B, T) in all.

    Examples are {"prompt": ids, "completion": ids, "label": bool}; `desirable` (B,) are the labels. The mismatched half
    estimates the reference point of KTO and needs no gradient. A batch of one row has no other completion and is refused.
    """

    def __init__(self, *, vocabulary: SpecialTokens, seed: int = 0) -> None:
        self.pad = vocabulary.pad  # and nothing is drawn

    def __call__(self, rows: Sequence[Example]) -> Batch:
        if len(rows) < 2:
            raise DataError(
                "KTO compares a completion with another row's: a batch needs 2 rows or more (data.batch_size)"
            )
        following = [*rows[1:], *rows[:1]]
        own = [[(row["prompt"], row["completion"])] for row in rows]
        mismatched = [[(row["prompt"], other["completion"])] for row, other in zip(rows, following, strict=True)]
        desirable = torch.tensor([bool(row["label"]) for row in rows])
        batch = completions_batch(own + mismatched, self.pad)
        _ignore(batch, [(row["completion"], row.get("completion_mask")) for row in [*rows, *following]])
        return {**batch, "desirable": desirable, "targets": _count(rows)}


def _count(rows: Sequence[Example]) -> torch.Tensor:
    """The number of rows, as the targets of a batch."""
    return torch.tensor(float(len(rows)))


def groups_batch(rows: Sequence[Group], pad: int, *, share_prompts: bool) -> Batch:
    """One row for each prompt with its completions as segments 1, 2, ...; see `PreferenceCollator` for share_prompts."""
    repeated = slice(-1, None) if share_prompts else slice(None)  # its last token predicts every completion's first
    parts = [
        [(p if n == 0 else p[repeated], completion) for n, completion in enumerate(completions)]
        for p, completions in rows
    ]
    batch = completions_batch(parts, pad)
    if share_prompts:
        batch["shared_prompt_len"] = torch.tensor([max(len(prompt) - 1, 0) for prompt, _ in rows])
    return batch


def completions_batch(rows: Sequence[Sequence[tuple[np.ndarray, np.ndarray]]], pad: int) -> Batch:
    """input_ids, labels and segment_ids (B, T) of rows of (prompt, completion), which become segments 1, 2, ..."""
    ids = [np.concatenate([part for pair in row for part in pair]) for row in rows]
    labels = [np.concatenate([_labels(*pair) for pair in row]) for row in rows]
    segments = [np.repeat(np.arange(len(row)) + 1, [len(p) + len(c) for p, c in row]) for row in rows]
    return {
        "input_ids": pad_rows(ids, pad),
        "labels": pad_rows(labels, IGNORED),
        "segment_ids": pad_rows(segments, 0),
    }


def text_labels(batch: Batch) -> torch.Tensor:
    """The labels (B, T) with those of the first segment's prompt added."""
    ids, first = batch["input_ids"], batch["segment_ids"] == 1
    labels = batch["labels"].clone()
    labels[:, :-1] = torch.where(first[:, :-1] & first[:, 1:], ids[:, 1:], labels[:, :-1])
    return labels


def _ignore(batch: Batch, completions: Sequence[tuple[np.ndarray, np.ndarray | None]]) -> None:
    """Remove the labels of tokens that do not count; completions: ids and masks in the order of the rows, None for all."""
    if all(mask is None for _, mask in completions):
        return
    counted = np.concatenate([np.ones(len(ids), bool) if mask is None else mask for ids, mask in completions])
    rows, columns = (batch["labels"] != IGNORED).nonzero(as_tuple=True)
    ignored = ~torch.from_numpy(counted)
    batch["labels"][rows[ignored], columns[ignored]] = IGNORED


def _labels(prompt: np.ndarray, completion: np.ndarray) -> np.ndarray:
    """The next token, where it belongs to the completion; without a prompt the first token has no label."""
    following = [np.full(len(prompt), IGNORED), completion, np.full(1, IGNORED)]
    return np.concatenate(following)[1:]
