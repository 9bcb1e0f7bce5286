"""Text alignment: positions of two tokenizers that have read the same characters."""

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from genai_pl.data import byte_tokenizer
from genai_pl.modules.text_alignment import TextAlignment, gather_pairs


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerFast:
    """A tokenizer with longer tokens than bytes, whose pieces carry spaces in front, and with a bos token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["the cat and the hat", "the bat and that"] * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


TEXT = "the cat: na\u00efve \U0001f600 and"


@pytest.mark.parametrize("student", ["bytes", "words"])
def test_pairs_have_read_the_same_text(words: PreTrainedTokenizerFast, student: str) -> None:
    ours, theirs = (byte_tokenizer(), words) if student == "bytes" else (words, byte_tokenizer())
    alignment = TextAlignment(ours, theirs, vocab_size=len(ours), longest=99)
    ids = np.asarray(ours(TEXT, add_special_tokens=False)["input_ids"])
    tokens, pairs = alignment.pair(ids)
    # every prefix of the teacher's tokens, decoded, against every prefix of the student's
    read = [theirs.decode(tokens[: n + 1], skip_special_tokens=True) for n in range(len(tokens))]
    ends = {text: n for n, text in enumerate(read) if "\ufffd" not in text}
    for n, pair in enumerate(pairs):
        text = ours.decode(ids[: n + 1], skip_special_tokens=True)
        assert pair == (-1 if "\ufffd" in text else ends.get(text, -1))
    assert (pairs >= 0).sum() >= 8


def test_rows_of_several_documents_become_rows_of_the_teacher(words: PreTrainedTokenizerFast) -> None:
    ours = byte_tokenizer()
    alignment = TextAlignment(ours, words, vocab_size=len(ours), longest=99)
    first, second = (ours(text, add_special_tokens=False)["input_ids"] for text in ("the cat", "a bat"))
    ids = torch.tensor([[*first, *second, 0], [*second, *first, 0]])
    segments = torch.tensor([[1] * 7 + [2] * 5 + [0], [1] * 5 + [2] * 7 + [0]])
    rows = alignment.read(ids, segments)
    assert rows.input_ids.shape[0] == 4
    assert (rows.pairs[segments == 0] == -1).all()
    hidden = torch.arange(rows.input_ids.numel())[:, None].view(*rows.input_ids.shape, 1).float()
    found = gather_pairs(hidden, rows.pairs).view(ids.shape)
    width = rows.input_ids.shape[1]
    for b, document, row in ((0, 1, 0), (0, 2, 1), (1, 1, 2), (1, 2, 3)):
        kept = (segments[b] == document) & (rows.pairs[b] >= 0)
        assert (found[b][kept] // width == row).all()
    last = rows.pairs[0, 6] % width  # "the cat" has been read by both
    assert words.decode(rows.input_ids[0, : last + 1], skip_special_tokens=True) == "the cat"


def test_half_a_character_has_no_text_and_a_short_context_no_later_pairs(words: PreTrainedTokenizerFast) -> None:
    ours = byte_tokenizer()
    ids = np.asarray(ours("\U0001f600 the", add_special_tokens=False)["input_ids"])
    alignment = TextAlignment(ours, words, vocab_size=len(ours), longest=3)
    tokens, pairs = alignment.pair(ids)
    assert len(tokens) == 3
    assert (pairs == -1).all()  # the bos token and two bytes of four
    assert alignment.pair(ids[:2])[0] == []
