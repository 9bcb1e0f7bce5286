"""Slower routes of wrapped models: a row for each document, and a cache whose layers cannot go back."""

import pytest
import torch
from one_family import built
from torch import Tensor

from genai_pl.config.generation import GenerationConfig
from genai_pl.generation import generate
from genai_pl.models.hf.transformers_model import WrappedDecoder, load_wrapped
from genai_pl.models.hf.transformers_rows import document_rows


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory) -> tuple[torch.nn.Module, WrappedDecoder]:
    folder = tmp_path_factory.mktemp("hybrid")
    theirs = built("qwen3_next")
    theirs.save_pretrained(folder)
    return theirs, load_wrapped(str(folder))


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 64, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "segments",
    [
        [[0, 0, 1, 1, 2], [1, 2, 2, 2, 0]],
        [[1, 1, 1], [1, 1, 1]],
        [[0, 0, 0], [0, 0, 3]],
        [[0, 0]],
        [[1, 2, 1, 1]],
    ],
)
def test_documents_get_rows_of_their_own_and_come_back_to_their_places(segments: list[list[int]]):
    ids = torch.tensor(segments)
    packed = 10 + torch.arange(ids.numel()).view_as(ids)
    # runs of equal numbers above 0, row after row
    documents, places = [], {}
    for b, row in enumerate(segments):
        for t, number in enumerate(row):
            if number == 0:
                continue
            if t == 0 or row[t - 1] != number:
                documents.append([])
            places[b, t] = (len(documents) - 1, len(documents[-1]))
            documents[-1].append(int(packed[b, t]))
    rows = document_rows(ids)
    split = rows.split(packed)
    assert [row[: len(d)] for row, d in zip(split.tolist(), documents, strict=False)] == documents
    joined = rows.join(split[..., None].float())[..., 0]
    assert all(joined[place] == packed[place] for place in places)


@torch.no_grad()
def test_a_recurrent_model_goes_on_after_a_rewind_and_after_rows_were_dropped(hybrid):
    theirs, ours = hybrid
    ids = tokens(2, 12)
    cache = ours.new_cache(2, 20)
    ours(ids[:, :9], cache=cache)
    cache.rewind(4)
    torch.testing.assert_close(ours(ids[:, 5:], cache=cache), theirs(ids).logits[:, 5:], atol=1e-4, rtol=1e-4)
    cache.keep_rows(torch.tensor([1]))
    more = tokens(1, 1, seed=2)
    expected = theirs(torch.cat([ids[1:], more], dim=1)).logits[:, -1:]
    torch.testing.assert_close(ours(more, cache=cache), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_cached_text_of_a_hybrid_is_that_of_transformers_generate(hybrid):
    theirs, ours = hybrid
    ids = tokens(2, 6, seed=3)
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert torch.equal(generate(ours, ids, GenerationConfig(temperature=0.0, max_new_tokens=10)), expected)
