"""Rotary positions that change with the length of a text, under model=hf: each text has those that it has alone."""

from pathlib import Path

import pytest
import torch
from one_family import built, wrapped
from torch import Tensor
from transformers import AutoModelForCausalLM

from genai_pl.errors import ConfigError
from genai_pl.models.hf.transformers_model import load_wrapped

LIMIT = 9  # tokens: of the texts of `one_family`, one is longer
FACTORS = {"short_factor": [1.0, 1.5, 2.0, 1.2], "long_factor": [1.0, 3.0, 5.0, 9.0], "rope_theta": 500.0}
LONG = {"rope_type": "longrope", "factor": 2.0, "original_max_position_embeddings": LIMIT, **FACTORS}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 500.0}
LIMITED = {  # longer texts have other frequencies
    "phi3": {"rope_parameters": LONG, "original_max_position_embeddings": LIMIT},
    "llama": {"rope_parameters": LONG, "original_max_position_embeddings": LIMIT},
    "mistral": {"rope_parameters": DYNAMIC, "max_position_embeddings": LIMIT},
}


def tokens(*shape: int) -> Tensor:
    return torch.randint(3, 64, shape, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("kind", ["phi3", "llama"])
def test_longrope_is_theirs_for_packed_padded_written_and_trained_texts_across_its_limit(kind: str, tmp_path: Path):
    outcome = wrapped(built(kind, **LIMITED[kind]), tmp_path)
    assert (outcome.refused, outcome.wrong, outcome.partly) == (None, (), {})


@pytest.mark.parametrize("kind", LIMITED)
@torch.no_grad()
def test_texts_in_any_company_and_after_any_others_have_the_logits_of_a_model_that_saw_nothing_else(
    kind: str, tmp_path: Path
):
    built(kind, **LIMITED[kind]).save_pretrained(tmp_path)
    ours = load_wrapped(str(tmp_path))
    ids = tokens(1, LIMIT + 23)
    parts = ids.split([LIMIT, LIMIT + 3, 3, 8], dim=1)
    expected = [alone(tmp_path, part) for part in parts]
    ours(tokens(2, 30))  # dynamic frequencies of a longer text, which transformers would keep
    segments = torch.cat([torch.full_like(part, n + 1) for n, part in enumerate(parts)], dim=1)
    for row, part in zip(ours(ids, segments).split([p.shape[1] for p in parts], dim=1), expected, strict=True):
        torch.testing.assert_close(row, part, rtol=0, atol=1e-5)
    # token by token with a cache, across the limit
    cache = ours.new_cache(1, 12)
    text = ids[:, :12]
    ours(text[:, :4], cache=cache)
    for n in range(4, 12):
        last = ours(text[:, n : n + 1], cache=cache)
        torch.testing.assert_close(last, alone(tmp_path, text[:, : n + 1])[:, -1:], rtol=0, atol=1e-5)
    cache.rewind(7)  # and back below it
    torch.testing.assert_close(ours(text[:, 5:6], cache=cache), alone(tmp_path, text[:, :6])[:, -1:], rtol=0, atol=1e-5)


def alone(folder: Path, text: Tensor) -> Tensor:
    """The logits of a model of transformers that has seen nothing before."""
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()(text).logits


def test_several_ranks_are_told_the_longest_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    built("llama", **LIMITED["llama"]).save_pretrained(tmp_path)
    ours = load_wrapped(str(tmp_path))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    ours(tokens(1, 12), torch.tensor([[1] * 9 + [2] * 3]))  # no text is longer
    with pytest.raises(ConfigError, match=rf"rope_type=longrope.*data\.seq_len to at most {LIMIT}"):
        ours(tokens(1, 12), torch.tensor([[1] * 2 + [2] * 10]))
