"""Text alignment: a teacher with another tokenizer reads the text of the student's tokens, and positions of both are paired.

Two positions are a pair if both models have read the same characters of a document there. What either predicts next then
is about the same text, so no probabilities have to be multiplied over the tokens of a span (as GOLD does), and nothing
drifts, as it would if positions were paired by number (as Boizard et al. 2024 do). Positions inside a token of the other
tokenizer have no pair.
"""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from genai_pl.data.token_bytes import token_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TeacherRows(NamedTuple):
    """What the teacher reads: input_ids and segment_ids (R, S), 0 in padding; and for each token of the student, (B, T), the
    number of its pair among the R S tokens, -1 without one."""

    input_ids: Tensor
    segment_ids: Tensor
    pairs: Tensor


class TextAlignment:
    """Rows of the student's tokens as rows of the teacher's, one for each document.

    longest: the teacher's context; what comes later in a document has no pair.
    """

    def __init__(
        self, student: "PreTrainedTokenizerBase", teacher: "PreTrainedTokenizerBase", *, vocab_size: int, longest: int
    ) -> None:
        self.student, self.teacher, self.longest = student, teacher, longest
        self.n_bytes = np.asarray(token_bytes(student, vocab_size))
        self.start = [i for i in teacher("")["input_ids"] if i == teacher.bos_token_id][:1]

    def read(self, input_ids: Tensor, segments: Tensor) -> TeacherRows:
        """The teacher's rows for input_ids and segments (B, T), 0 in padding."""
        ids, documents = input_ids.cpu().numpy(), segments.cpu().numpy()
        rows: list[list[int]] = []
        found: list[
            tuple[tuple[int, np.ndarray], np.ndarray]
        ] = []  # places of the student, and their pairs, by teacher row
        for b in range(len(ids)):
            for document in range(1, int(documents[b].max()) + 1):
                places = np.flatnonzero(documents[b] == document)
                tokens, pairs = self.pair(ids[b, places])
                if tokens:
                    rows.append(tokens)
                    found.append(((b, places), pairs))
        # rows of one length, and places in them
        width = max(map(len, rows), default=1)
        device, n_rows = input_ids.device, max(len(rows), 1)
        tokens, lengths = torch.zeros(n_rows, width, dtype=torch.long), torch.zeros(n_rows, 1, dtype=torch.long)
        numbers = np.full(ids.shape, -1)
        for r, (row, ((b, places), pairs)) in enumerate(zip(rows, found, strict=True)):
            tokens[r, : len(row)], lengths[r] = torch.tensor(row), len(row)
            numbers[b, places] = np.where(pairs < 0, -1, pairs + r * width)
        own = (torch.arange(width) < lengths).long()
        return TeacherRows(tokens.to(device), own.to(device), torch.from_numpy(numbers).to(device))

    def pair(self, ids: np.ndarray) -> tuple[list[int], np.ndarray]:
        """The teacher's tokens of a document's text, and for each of the student's ids (n,) the place of its pair, or -1."""
        text = self.student.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        ends = np.cumsum(self.n_bytes[ids])  # bytes read after each token
        lost = int(ends[-1]) - len(text.encode())
        if lost not in (0, 1):  # half a character at an end of the row, which no text can show
            return [], np.full(len(ids), -1)
        ends = np.maximum(ends - lost, 0)  # decoding drops the space that SentencePiece puts before a text
        encoded = self.teacher(text, add_special_tokens=False, return_offsets_mapping=True)
        tokens = [*self.start, *encoded["input_ids"]]
        read = np.cumsum([0, *(len(character.encode()) for character in text)])
        places = {0: 0} if self.start else {}
        for place, (_, end) in enumerate(encoded["offset_mapping"], len(self.start)):
            places[int(read[end])] = place  # of the parts of a character the last
        pairs = np.asarray([places.get(int(end), -1) for end in ends])
        return tokens[: self.longest], np.where(pairs < self.longest, pairs, -1)


def gather_pairs(hidden: Tensor, pairs: Tensor) -> Tensor:
    """The teacher's hidden states (B T, C) at the pairs (B, T) of its flattened tokens; the first where there is none."""
    return F.embedding(pairs.flatten().clamp(min=0), hidden.flatten(0, 1))
