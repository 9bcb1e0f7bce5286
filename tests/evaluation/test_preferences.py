"""Rows of prompts with completions: a judge reads all of their tokens, a language model all but the last."""

import pytest

from genai_pl.data.tokenizer import byte_tokenizer
from genai_pl.errors import DataError
from genai_pl.evaluation import pair_windows


@pytest.mark.parametrize(("judges", "n_kept"), [(True, 8), (False, 9)])
def test_no_model_reads_more_tokens_than_its_context(judges: bool, n_kept: int) -> None:
    [short, long] = pair_windows(["ab", "abcdefgh"], ["xyz"] * 2, byte_tokenizer(), seq_len=8, judges=judges)
    assert [len(row.tokens) for row in (short, long)] == [6, n_kept]  # 4 of them are the completion with its end
    assert [row.n_scored for row in (short, long)] == [4, 4]
    assert [row.truncated for row in (short, long)] == [False, True]
    assert bytes(long.tokens[:-1].tolist()).decode() == "abcdefghxyz"[-n_kept + 1 :]


@pytest.mark.parametrize(("judges", "most"), [(True, 6), (False, 7)])
def test_a_completion_without_room_for_a_prompt_is_refused(judges: bool, most: int) -> None:
    options = {"tokenizer": byte_tokenizer(), "seq_len": 8, "judges": judges}
    assert pair_windows(["a"], ["x" * most], **options)[0].n_scored == most + 1
    with pytest.raises(DataError, match="row 1: a completion has"):
        pair_windows(["a"], ["x" * (most + 1)], **options)
