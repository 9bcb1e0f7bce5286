"""Embeddings and rewards of texts: one forward pass per batch of whole texts, without generation.

A sentence head (pooling, dense layers, normalization) turns hidden states (B, T, C) into vectors (B, D). Where a folder
describes one as sentence-transformers does, that one is used, so vectors equal those of the other library.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from genai_pl.atomic_io import ADAPTER, is_checkpoint
from genai_pl.checkpoints.file import MARK, read_checkpoint
from genai_pl.config.enums import Shape
from genai_pl.config.model import ModelConfig
from genai_pl.data.text_tokens import encode_texts, lowercase_texts
from genai_pl.errors import CheckpointError, ConfigError
from genai_pl.evaluation.scoring import batches, score
from genai_pl.evaluation.windows import ScoredWindow, completion_windows, text_windows
from genai_pl.models import Model
from genai_pl.models.hf.folder import read_json
from genai_pl.models.pooling import POOLINGS, scores
from genai_pl.models.sentence import SentenceHead, default_head, read_head
from genai_pl.models.sentence_files import MODULES, POOLING
from genai_pl.models.virtual_tokens import context_of
from genai_pl.objectives.collate import pad_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH_TOKENS = 8192  # padding included
TokenRows = Sequence[Sequence[int]]


def find_sentence_head(
    pooling: str | None, path: Path, tokenizer: "PreTrainedTokenizerBase", config: ModelConfig
) -> SentenceHead:
    """The head that makes one vector of a text.

    pooling: mean, last or cls; None takes what the folder describes, else mean for an encoder and last for a decoder.
    """
    if pooling is not None and pooling not in POOLINGS:
        raise ConfigError(f"pooling={pooling} is not one of {', '.join(POOLINGS)}")
    head = saved_sentence_head(path, tokenizer, config)
    if head is None:
        kind = "mean" if config.shape is Shape.encoder else "last"
        head = default_head(kind, n_embd=config.n_embd, max_length=None, closes=True)
        if (path / POOLING).is_file():
            head = head.with_settings(POOLING, read_json(path / POOLING))
    return (head if pooling is None else head.with_pooling(pooling)).eval()


def saved_sentence_head(path: Path, tokenizer: "PreTrainedTokenizerBase", config: ModelConfig) -> SentenceHead | None:
    """The head that a folder or checkpoint describes for sentence-transformers, or None.

    Its limit of tokens is completed from the tokenizer and the model, and its lower-casing is applied to the tokenizer.
    """
    head = _read_head(path, config.n_embd)
    if head is None:
        return None
    if head.max_length is None:  # sentence-transformers 6 stores the limit with the tokenizer
        head.max_length = min(tokenizer.model_max_length, config.max_seq_len)
    head.max_length = min(head.max_length, config.max_seq_len)
    if head.lower_case:
        lowercase_texts(tokenizer)
    return head


def _read_head(path: Path, n_embd: int) -> SentenceHead | None:
    """The head of a folder, of the base of an adapter, or of a checkpoint, as it is stored; None without one."""
    # a checkpoint holds the head's files and weights
    if is_checkpoint(path):
        contents = read_checkpoint(path)
        files = contents[MARK].get("files", {})
        if MODULES not in files:
            return None
        head = SentenceHead(files, n_embd=n_embd, where=str(path))
        prefix = "sentence."
        state = {k.removeprefix(prefix): x for k, x in contents["state_dict"].items() if k.startswith(prefix)}
        try:
            head.load_state_dict(state)
        except RuntimeError as error:
            raise CheckpointError(f"{path}: refused, {str(error).splitlines()[0]}") from None
        return head
    # an adapter's head is that of its base
    if (path / ADAPTER).is_file() and not (path / MODULES).is_file():
        base = str(read_json(path / ADAPTER).get("base_model_name_or_path") or "")
        path = path / base if (path / base).is_dir() else Path(base)
    # a folder has the files of sentence-transformers, or none
    return read_head(path, n_embd=n_embd)


def encode_sentences(
    tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str], head: SentenceHead, *, max_length: int | None = None
) -> list[list[int]]:
    """Token ids of each text after the head's prompt, truncated to its limit and max_length; special tokens are kept."""
    limits = [limit for limit in (head.max_length, max_length) if limit is not None]
    prompted = [head.prompt + text for text in texts]
    return encode_texts(tokenizer, prompted, max_length=min(limits, default=None), add_end=head.closes)


@torch.inference_mode()
def embed(model: Model, rows: TokenRows, head: SentenceHead) -> Tensor:
    """Vectors (N, D), float32 on the CPU, of N rows of token ids."""
    vectors = torch.empty(len(rows), head.size)
    for batch, input_ids, segment_ids in padded(model, rows, BATCH_TOKENS):
        hidden = model.features(input_ids, segment_ids).float()
        vectors[batch] = head.to(hidden).forward(hidden, segment_ids).cpu()
    return vectors


@torch.inference_mode()
def reward_scores(
    model: Model,
    rows: TokenRows,
    *,
    batch_tokens: int = BATCH_TOKENS,
    on_batch: Callable[[int], object] | None = None,
) -> Tensor:
    """A reward model's score of each of R rows of token ids, (R,) float64 on the CPU.

    batch_tokens: tokens of a batch, padding included. on_batch: called with the number of rows after every batch.
    """
    rewards = torch.zeros(len(rows), dtype=torch.float64)
    for batch, input_ids, segment_ids in padded(model, rows, batch_tokens):
        rewards[batch] = scores(model, input_ids, segment_ids, 1)[:, 0].double().cpu()
        if on_batch is not None:
            on_batch(len(batch))
    return rewards


def logprobs(
    model: Model, tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[str] | None, texts: Sequence[str]
) -> list[tuple[float, int]]:
    """(log-probability in nats, tokens) of each text: after its prompt, or after a bos if the tokenizer has one."""
    windows, owners = logprob_windows(tokenizer, prompts, texts, seq_len=context_of(model))
    totals, counts = np.zeros(len(texts)), np.zeros(len(texts), dtype=int)
    window_scores = score(model, windows, batch_tokens=BATCH_TOKENS)
    for n, window, nll in zip(owners, windows, window_scores.nll.tolist(), strict=True):
        totals[n] -= nll
        counts[n] += window.n_scored
    return list(zip(totals.tolist(), counts.tolist(), strict=True))


def logprob_windows(
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str] | None,
    texts: Sequence[str],
    *,
    seq_len: int,
    first: int = 0,
) -> tuple[list[ScoredWindow], list[int]]:
    """Windows to be scored and the number of the text that each belongs to; texts are numbered from `first`."""
    if prompts is not None:
        owners = list(range(first, first + len(texts)))
        row_numbers = [n + 1 for n in owners]  # for errors, counted from 1
        return completion_windows(prompts, texts, tokenizer, seq_len=seq_len, owners=row_numbers), owners
    per_text = [text_windows([text], tokenizer, seq_len=seq_len) for text in texts]
    owners = [n for n, windows in enumerate(per_text, start=first) for _ in windows]
    return [row for windows in per_text for row in windows], owners


def padded(model: Model, rows: TokenRows, batch_tokens: int) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Batches: row numbers, and input_ids and segment_ids (B, T) of these rows, padded on the right."""
    device = model.embed.weight.device
    for batch in batches([len(row) for row in rows], batch_tokens):
        batch_rows = [rows[n] for n in batch]
        segments = [np.ones(len(row), dtype=np.int64) for row in batch_rows]
        yield batch, pad_rows(batch_rows, 0).to(device), pad_rows(segments, 0).to(device)
