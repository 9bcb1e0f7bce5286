"""Finished rows leave the batch, which changes nothing else."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from genai_pl.config.generation import GenerationConfig
from genai_pl.config.model import ModelConfig
from genai_pl.generation import complete, decode, left_pad
from genai_pl.generation.decode import WORTH_DROPPING
from genai_pl.models import EncoderDecoder
from genai_pl.peft import Adapter, RowWeights, adapters_of, lora, prefix, prompt

ROTARY = {"position": "rotary", "norm": "rmsnorm", "gated_mlp": True, "bias": False, "n_kv_head": 1}
N = 24
PROMPTS = [[3 + (i + j) % 40 for j in range(2 + i % 5)] for i in range(N)]
CONFIG = GenerationConfig(max_new_tokens=16)
# the number of steps that each row is to take: most end soon, one never
ENDS = Tensor([2 + i % 3 if i % 8 else 5 + i // 3 for i in range(N - 1)] + [99])
NEVER = torch.full((N,), 99)


def written(
    model: nn.Module, config: GenerationConfig = CONFIG, *, ends: Tensor, start: tuple | None = None, **options: object
) -> tuple[Tensor, list[int]]:
    """The tokens (N, steps) of rows that the caller ends after `ends` steps each, and the number of rows in each forward pass."""
    read: list[int] = []
    hook = model.lm_head.register_forward_hook(lambda module, args, out: read.append(len(args[0])))
    reader, input_ids, segment_ids = start or (model, *left_pad(PROMPTS, 0))
    finished = torch.zeros(N * options.get("num_samples", 1), dtype=torch.bool)
    options = {
        "segment_ids": segment_ids,
        "generator": torch.Generator().manual_seed(0),
        "finished": finished,
        **options,
    }
    steps = []
    for step in decode(reader, input_ids, config, pad_token_id=0, **options):
        steps.append(step)
        finished |= len(steps) >= ends
    hook.remove()
    return torch.stack(steps, 1), read[1:]


def alone(tokens: Tensor, ends: Tensor) -> Tensor:
    """The tokens that rows generate up to their ends, padded with 0, from a run without ends."""
    return tokens.masked_fill(torch.arange(tokens.shape[1]) >= ends[:, None], 0)


@pytest.mark.parametrize(
    "options", [{}, ROTARY, {"position": "alibi"}, {"window": 4}, {**ROTARY, "max_seq_len": 10}], ids=str
)
def test_finished_rows_are_dropped_and_the_others_write_what_they_would(small_model: Callable, options: dict) -> None:
    model = small_model(**options)
    tokens, read = written(model, ends=ENDS)
    whole, all_rows = written(model, ends=NEVER)
    assert torch.equal(tokens, alone(whole, ENDS)[:, : tokens.shape[1]])
    assert set(all_rows) == {N}
    assert read[0] == N
    assert read[-1] < N - WORTH_DROPPING
    # never more than twice those that go on, but for the few that are not worth a copy
    going = [int((step < ENDS).sum()) for step in range(1, len(read) + 1)]
    assert all(n < 2 * left + WORTH_DROPPING for n, left in zip(read, going, strict=True))


def test_samples_of_a_prompt_are_dropped_too(small_model: Callable) -> None:
    model, ends = small_model(**ROTARY), torch.cat([ENDS, ENDS.flip(0)])
    tokens, read = written(model, ends=ends, num_samples=2)
    whole, _ = written(model, ends=torch.cat([NEVER, NEVER]), num_samples=2)
    assert torch.equal(tokens, alone(whole, ends)[:, : tokens.shape[1]])
    assert read[-1] < N


def adapted(model: nn.Module, method: Callable, **options: int) -> tuple[nn.Module, Adapter]:
    """The model with an adapter of random weights."""
    model = method(model, **options)
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    return model, adapters_of(model)[0]


METHODS = {"lora": (lora, {"rank": 2}), "prefix": (prefix, {"n_tokens": 3}), "prompt": (prompt, {"n_tokens": 3})}


@pytest.mark.parametrize("method", METHODS)
def test_adapter_weights_by_row_follow_their_rows(small_model: Callable, method: str) -> None:
    make, options = METHODS[method]
    model, adapter = adapted(small_model(**ROTARY), make, **options)
    row_weights = RowWeights([(adapter, (torch.arange(N) % 2).float())])
    tokens, read = written(model, ends=ENDS, row_weights=row_weights)
    whole, _ = written(model, ends=NEVER, row_weights=row_weights)
    assert torch.equal(tokens, alone(whole, ENDS)[:, : tokens.shape[1]])
    assert read[-1] < N
    assert adapter.rows is None
    assert not torch.equal(written(model, ends=ENDS)[0], tokens)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3, "num_return": 2}, {"prompt_lookup": 2}], ids=["samples", "beams", "speculation"]
)
def test_rows_with_adapters_of_their_own_are_continued_as_by_a_model_with_that_adapter(
    small_model: Callable, byte_tokenizer, method: str, options: dict
) -> None:
    make, sizes = METHODS[method]
    model, adapter = adapted(small_model(**ROTARY, vocab_size=128), make, **sizes)
    config = GenerationConfig(max_new_tokens=12, temperature=0, **options)
    rows, n = [list(b"abcabc"), list(b"xy"), list(b"abcabc")], 1 if config.num_beams > 1 else 2
    by_rows = complete(
        model,
        byte_tokenizer,
        rows,
        config,
        num_samples=n,
        row_weights=RowWeights([(adapter, torch.tensor([1.0, 0.0, 0.0]))]),
    )
    for row, weight, completions in zip(rows, (1.0, 0.0, 0.0), by_rows, strict=True):
        adapter.weight = weight
        (expected,) = complete(model, byte_tokenizer, [row], config, num_samples=n)
        adapter.weight = 1.0
        assert [c.tokens for c in completions] == [c.tokens for c in expected]
    assert by_rows[0][0].tokens != by_rows[2][0].tokens


def test_penalties_and_rules_follow_their_rows(small_model: Callable) -> None:
    model = small_model()
    config = GenerationConfig(max_new_tokens=16, repetition_penalty=1.5, no_repeat_ngram_size=2, top_k=20)
    tokens, read = written(model, config, ends=ENDS)
    whole, _ = written(model, config, ends=NEVER)
    assert torch.equal(tokens, alone(whole, ENDS)[:, : tokens.shape[1]])
    assert read[-1] < N


def test_an_encoder_decoder_drops_the_sources_with_their_rows() -> None:
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": 100, "max_seq_len": 64, "init_std": 0.3}
    model = EncoderDecoder(ModelConfig(shape="encoder_decoder", position="sinusoidal", **sizes)).eval()

    with torch.no_grad():
        reader = model.encode_source(*left_pad(PROMPTS, 0))
    start = (reader, torch.zeros(N, 1, dtype=torch.long), None)
    tokens, read = written(model, ends=ENDS, start=start)
    whole, _ = written(model, ends=NEVER, start=start)
    assert torch.equal(tokens, alone(whole, ENDS)[:, : tokens.shape[1]])
    assert read[-1] < N - WORTH_DROPPING
