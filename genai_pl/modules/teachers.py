"""Teachers of a student, by where their predictions come from: a model beside it, one of another tokenizer, or a file.

Each is called with the rows that the student reads, and says what comes next at each of their tokens. A teacher behind an
address is in `served_teacher.py`.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from genai_pl.errors import ConfigError
from genai_pl.kernels.distillation import Teacher, TeacherLogprobs, linear_teacher
from genai_pl.modules.base import Batch
from genai_pl.modules.precompute import fingerprint
from genai_pl.modules.teacher_cache import TeacherCache
from genai_pl.modules.text_alignment import TextAlignment, gather_pairs


class Taught(NamedTuple):
    """A teacher's predictions for the flattened tokens (B T) of rows, and which of these have any, (B T); None: all have."""

    predict: Teacher
    has_pair: Tensor | None = None


class RowTeacher(ABC):
    """What a student learns from.

    context: tokens of a row that it reads at most, None where nothing says. finite: it knows the training rows alone, so
    that nothing is learned of validation rows, or of what the student writes. universal: it has another vocabulary.
    """

    context: int | None = None
    finite = False
    universal = False

    @abstractmethod
    def __call__(self, batch: Batch, labels: Tensor) -> Taught:
        """The predictions for rows `input_ids` (B, T), where labels (B, T) has something to learn."""

    @abstractmethod
    def fingerprint(self, precision: str) -> str:
        """A name in hex of everything that its predictions depend on beside the rows."""

    def to(self, device: torch.device) -> "RowTeacher":
        """The same, with the weights that it has on a device."""
        return self


class ModelTeacher(RowTeacher):
    """A frozen model with the student's vocabulary. temperature: of its predictions."""

    def __init__(self, model: nn.Module, *, temperature: float) -> None:
        self.model = model.requires_grad_(False).eval()
        self.temperature, self.context = temperature, model.config.max_seq_len

    def __call__(self, batch: Batch, labels: Tensor) -> Taught:
        return Taught(self.predictions(self.read(batch["input_ids"], batch.get("segment_ids")).flatten(0, 1)))

    def fingerprint(self, precision: str) -> str:
        return fingerprint(self.model, precision, f"{self.temperature}")

    def to(self, device: torch.device) -> "RowTeacher":
        self.model.to(device)
        return self

    @torch.no_grad()
    def read(self, input_ids: Tensor, segments: Tensor | None) -> Tensor:
        """The states before its head, (B, T, C)."""
        return self.model.to_head(self.model.features(input_ids, segments))

    def predictions(self, hidden: Tensor) -> Teacher:
        """What it predicts from such states (N, C)."""
        head, softcap = self.model.lm_head, self.model.config.logit_softcap
        return linear_teacher(hidden, head.weight, bias=head.bias, softcap=softcap, temperature=self.temperature)


class TextTeacher(ModelTeacher):
    """A frozen model of any tokenizer, whose predictions count by rank where it has read the same text."""

    universal = True

    def __init__(self, model: nn.Module, alignment: TextAlignment, *, temperature: float) -> None:
        super().__init__(model, temperature=temperature)
        self.alignment = alignment

    def __call__(self, batch: Batch, labels: Tensor) -> Taught:
        segments = batch.get("segment_ids", torch.ones_like(batch["input_ids"]))
        read = self.alignment.read(batch["input_ids"], segments)
        predict = self.predictions(gather_pairs(self.read(read.input_ids, read.segment_ids), read.pairs))
        return Taught(lambda rows: predict(rows)._replace(ranked=True), (read.pairs >= 0).flatten())


class FileTeacher(RowTeacher):
    """The likeliest tokens of a teacher at each position of the training rows, read from disk."""

    finite = True

    def __init__(self, cache: TeacherCache, *, vocab_size: int) -> None:
        self.cache, self.vocab_size = cache, vocab_size

    def __call__(self, batch: Batch, labels: Tensor) -> Taught:
        logprobs, ids = self.cache.read(batch["rows"], labels.shape[1], device=labels.device)
        check_ids(ids, self.vocab_size, source=f"objective.teacher={self.cache.folder}")
        return Taught(likeliest(logprobs.flatten(0, 1), ids.flatten(0, 1)))

    def fingerprint(self, precision: str) -> str:
        return self.cache.contents.teacher


def check_ids(ids: Tensor, vocab_size: int, *, source: str) -> None:
    """ConfigError for tokens that the student does not have."""
    found = [int(ids.min()), int(ids.max())]
    if wrong := [token for token in found if not 0 <= token < vocab_size]:
        raise ConfigError(
            f"{source}: names token {wrong[0]}, and the student has {vocab_size:,}; they must share a vocabulary"
        )


def likeliest(logprobs: Tensor, ids: Tensor) -> Teacher:
    """A teacher of log-probabilities (N, K + 1) of words ids (N, K) and of all others."""
    return lambda rows: TeacherLogprobs(logprobs[rows], ids[rows])
