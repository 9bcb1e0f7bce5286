"""Prefix caches: prompts that continue what was decoded give the same tokens, and less is read."""

import sys

import pytest
import torch

from genai_pl.config.generation import GenerationConfig
from genai_pl.config.model import ModelConfig
from genai_pl.generation.completions import left_pad
from genai_pl.generation.decode import decode
from genai_pl.generation.prefix_cache import PrefixCache
from genai_pl.models import Decoder
from tests.small_models import GPT, LLAMA, MODELS

KINDS = {
    **MODELS,
    "alibi": {**LLAMA, "position": "alibi"},
    "window": {**LLAMA, "window": 6},
    "performer": {**GPT, "attention_kind": "performer"},
}


def model(kind: str) -> Decoder:
    torch.manual_seed(0)
    return Decoder(ModelConfig(**{**KINDS[kind], "max_seq_len": 128})).double().eval()


def completions(
    policy: Decoder, prompts: list[list[int]], cache: PrefixCache | None, *, copies: int = 1, seed: int = 0
) -> list[list[int]]:
    ids, segments = left_pad(prompts, 0, device=torch.device("cpu"))
    config = GenerationConfig(max_new_tokens=6)
    steps = decode(
        policy, ids, config, segment_ids=segments, generator=torch.Generator().manual_seed(seed), eos_token_id=range(50),
        num_samples=copies, prefix_cache=cache,
    )  # fmt: skip
    rows = torch.stack(list(steps), dim=1).tolist()
    return [row[: next((n for n, t in enumerate(row, 1) if t < 50), len(row))] for row in rows]


@pytest.mark.parametrize("drops", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_turns_with_a_cache_are_those_without(kind: str, drops: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if drops:
        monkeypatch.setattr(sys.modules["genai_pl.generation.decode"], "WORTH_DROPPING", 1)
    policy, draw, n_read = model(kind), torch.Generator().manual_seed(3), {}
    counted = policy.features
    for name in ("without", "with"):
        cache, n_read[name] = (PrefixCache() if name == "with" else None), 0

        def features(input_ids, *arguments, name=name, **options):
            n_read[name] += input_ids.numel()
            return counted(input_ids, *arguments, **options)

        monkeypatch.setattr(policy, "features", features)
        draw.manual_seed(3)
        prompts, copies, said = [[7, 8, 9], list(range(100, 112)), [5] * 30], 2, []
        for turn in range(4):
            rows = completions(policy, prompts, cache, copies=copies, seed=turn)
            contexts = [prompts[i // copies] + row for i, row in enumerate(rows)]
            said.append(contexts)
            # observations of unequal lengths; every third episode ends
            going_on = [i for i in range(len(contexts)) if (i + turn) % 3]
            if cache is not None:
                cache.select(going_on)
            lengths = torch.randint(1, 9, (len(contexts),), generator=draw).tolist()
            prompts, copies = [contexts[i] + [60 + i] * lengths[i] for i in going_on], 1
        if name == "without":
            expected = said
    assert said == expected
    assert n_read["with"] < (0.8 if kind != "performer" else 1.01) * n_read["without"]


def test_a_prompt_that_continues_nothing_is_read_whole() -> None:
    policy, cache = model("llama"), PrefixCache()
    completions(policy, [[7, 8, 9], [100, 101]], cache)
    other = [[50, 60, 70, 80], [100, 101, 102, 103, 104, 105]]
    assert completions(policy, other, cache, seed=1) == completions(policy, other, None, seed=1)
    # and so is another number of prompts
    assert completions(policy, other[:1], cache, seed=1) == completions(policy, other[:1], None, seed=1)
