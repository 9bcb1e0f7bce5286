"""Texts become embeddings or scores in one pass of the model, batch by batch."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from genai_pl.data.tokenizer import end_token
from genai_pl.errors import ConfigError
from genai_pl.evaluation.rows import Row, completion_rows, text_rows
from genai_pl.evaluation.scoring import batches, score
from genai_pl.models import Model
from genai_pl.models.pooling import POOLINGS, pool
from genai_pl.models.scores import scores
from genai_pl.names import Shape
from genai_pl.objectives.rows import pad_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH_TOKENS = 8192  # padding included
MODES = {"pooling_mode_mean_tokens": "mean", "pooling_mode_lasttoken": "last", "pooling_mode_cls_token": "cls"}
Rows = Sequence[Sequence[int]]


def find_pooling(wanted: str | None, path: Path, shape: Shape) -> str:
    """How hidden states become one vector: as asked, as the folder says to sentence-transformers, or as the shape suggests."""
    if wanted is not None:
        if wanted not in POOLINGS:
            raise ConfigError(f"pooling={wanted} is not one of {', '.join(POOLINGS)}")
        return wanted
    file = path / "1_Pooling" / "config.json"
    if file.is_file():
        modes = json.loads(file.read_text(encoding="utf-8"))
        found = [kind for mode, kind in MODES.items() if modes.get(mode)]
        if len(found) != 1:
            raise ConfigError(f"{file}: no pooling of ours; choose pooling={'|'.join(POOLINGS)}")
        return found[0]
    return "mean" if shape is Shape.encoder else "last"


def encode_whole(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]) -> list[list[int]]:
    """Tokens of each text with an end token, as embeddings and rewards are trained on them."""
    end = end_token(tokenizer)
    rows = tokenizer(list(texts), verbose=False)["input_ids"]
    return [row if end is None or row[-1:] == [end] else [*row, end] for row in rows]


@torch.inference_mode()
def embed(model: Model, rows: Rows, pooling: str) -> Tensor:
    """Unit vectors (N, C) of rows of tokens, float32 on the CPU."""
    found = torch.empty(len(rows), model.config.n_embd)
    for batch, input_ids, segment_ids in _padded(model, rows, BATCH_TOKENS):
        hidden = model.features(input_ids, segment_ids).float()
        found[batch] = F.normalize(pool(hidden, segment_ids, pooling), dim=-1).cpu()
    return found


@torch.inference_mode()
def judge(
    model: Model,
    rows: Rows,
    *,
    batch_tokens: int = BATCH_TOKENS,
    on_batch: Callable[[int], object] | None = None,
) -> Tensor:
    """A reward model's score of each row, (R,) float64 on the CPU; `on_batch` hears of every batch how many rows it had."""
    found = torch.zeros(len(rows), dtype=torch.float64)
    for batch, input_ids, segment_ids in _padded(model, rows, batch_tokens):
        found[batch] = scores(model, input_ids, segment_ids, 1)[:, 0].double().cpu()
        if on_batch is not None:
            on_batch(len(batch))
    return found


def logprobs(
    model: Model, tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[str] | None, texts: Sequence[str]
) -> list[tuple[float, int]]:
    """Log-probability in nats of each text, and of how many tokens: after its prompt, or after a bos if the tokenizer has one."""
    rows, owners = logprob_rows(tokenizer, prompts, texts, seq_len=model.config.max_seq_len)
    totals, counts = np.zeros(len(texts)), np.zeros(len(texts), dtype=int)
    found = score(model, rows, batch_tokens=BATCH_TOKENS)
    for n, row, nll in zip(owners, rows, found.nll.tolist(), strict=True):
        totals[n] -= nll
        counts[n] += row.n_scored
    return list(zip(totals.tolist(), counts.tolist(), strict=True))


def logprob_rows(
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str] | None,
    texts: Sequence[str],
    *,
    seq_len: int,
    first: int = 0,
) -> tuple[list[Row], list[int]]:
    """Rows to be scored, and to which text each belongs; the texts are numbered from `first` on."""
    if prompts is not None:
        owners = list(range(first, first + len(texts)))
        named = [n + 1 for n in owners]  # in what an error says
        return completion_rows(prompts, texts, tokenizer, seq_len=seq_len, owners=named), owners
    per_text = [text_rows([text], tokenizer, seq_len=seq_len) for text in texts]
    owners = [n for n, one in enumerate(per_text, start=first) for _ in one]
    return [row for one in per_text for row in one], owners


def _padded(model: Model, rows: Rows, batch_tokens: int) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Which rows, and input_ids and segment_ids (B, T) of them, padded on the right."""
    device = model.embed.weight.device
    for batch in batches([len(row) for row in rows], batch_tokens):
        chosen = [rows[n] for n in batch]
        segments = [np.ones(len(row), dtype=np.int64) for row in chosen]
        yield batch, pad_rows(chosen, 0).to(device), pad_rows(segments, 0).to(device)
