"""Texts become embeddings or scores in one pass of the model, batch by batch."""

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
from genai_pl.objectives.collate import pad_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH_TOKENS = 8192  # padding included
TokenRows = Sequence[Sequence[int]]


def find_sentence_head(
    pooling: str | None, path: Path, tokenizer: "PreTrainedTokenizerBase", config: ModelConfig
) -> SentenceHead:
    """How a model makes one vector of a text: by a pooling that is asked for, else as its folder says or its shape suggests."""
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
    """The head that a folder or checkpoint tells sentence-transformers of, None if none; the tokenizer then writes lower case
    where that is said too.
    """
    head = _read_head(path, config.n_embd)
    if head is None:
        return None
    if head.max_length is None:  # sentence-transformers 6 keeps it with the tokenizer
        head.max_length = min(tokenizer.model_max_length, config.max_seq_len)
    head.max_length = min(head.max_length, config.max_seq_len)
    if head.lower_case:
        lowercase_texts(tokenizer)
    return head


def _read_head(path: Path, n_embd: int) -> SentenceHead | None:
    """The head that belongs to a folder, to the base of an adapter, or to a checkpoint."""
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
    if (path / ADAPTER).is_file() and not (path / MODULES).is_file():
        base = str(read_json(path / ADAPTER).get("base_model_name_or_path") or "")
        path = path / base if (path / base).is_dir() else Path(base)
    return read_head(path, n_embd=n_embd)


def encode_sentences(
    tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str], head: SentenceHead, *, max_length: int | None = None
) -> list[list[int]]:
    """Tokens of each text behind the head's prompt, cut to its length and to max_length, without losing special tokens."""
    limits = [limit for limit in (head.max_length, max_length) if limit is not None]
    whole = [head.prompt + text for text in texts]
    return encode_texts(tokenizer, whole, max_length=min(limits, default=None), closes=head.closes)


@torch.inference_mode()
def embed(model: Model, rows: TokenRows, head: SentenceHead) -> Tensor:
    """Vectors (N, D) of rows of tokens, float32 on the CPU."""
    found = torch.empty(len(rows), head.size)
    for batch, input_ids, segment_ids in _padded(model, rows, BATCH_TOKENS):
        hidden = model.features(input_ids, segment_ids).float()
        found[batch] = head.to(hidden).forward(hidden, segment_ids).cpu()
    return found


@torch.inference_mode()
def reward_scores(
    model: Model,
    rows: TokenRows,
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
    rows, owners = logprob_windows(tokenizer, prompts, texts, seq_len=model.config.max_seq_len)
    totals, counts = np.zeros(len(texts)), np.zeros(len(texts), dtype=int)
    found = score(model, rows, batch_tokens=BATCH_TOKENS)
    for n, row, nll in zip(owners, rows, found.nll.tolist(), strict=True):
        totals[n] -= nll
        counts[n] += row.n_scored
    return list(zip(totals.tolist(), counts.tolist(), strict=True))


def logprob_windows(
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str] | None,
    texts: Sequence[str],
    *,
    seq_len: int,
    first: int = 0,
) -> tuple[list[ScoredWindow], list[int]]:
    """Rows to be scored, and to which text each belongs; the texts are numbered from `first` on."""
    if prompts is not None:
        owners = list(range(first, first + len(texts)))
        named = [n + 1 for n in owners]  # in what an error says
        return completion_windows(prompts, texts, tokenizer, seq_len=seq_len, owners=named), owners
    per_text = [text_windows([text], tokenizer, seq_len=seq_len) for text in texts]
    owners = [n for n, one in enumerate(per_text, start=first) for _ in one]
    return [row for one in per_text for row in one], owners


def _padded(model: Model, rows: TokenRows, batch_tokens: int) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Which rows, and input_ids and segment_ids (B, T) of them, padded on the right."""
    device = model.embed.weight.device
    for batch in batches([len(row) for row in rows], batch_tokens):
        chosen = [rows[n] for n in batch]
        segments = [np.ones(len(row), dtype=np.int64) for row in chosen]
        yield batch, pad_rows(chosen, 0).to(device), pad_rows(segments, 0).to(device)
