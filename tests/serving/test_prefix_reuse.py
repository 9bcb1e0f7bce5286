"""Prefix cache of the engine: answers are those of `complete` without any cache, and what was read is not read again."""

from pathlib import Path

import pytest
import torch
from torch import nn

from genai_pl import peft
from genai_pl.config.generation import GenerationConfig
from genai_pl.generation import complete
from genai_pl.models import Decoder
from genai_pl.serving.engine.engine import Engine
from genai_pl.serving.engine.request import Request
from tests.serving.engines import SHAPES, TOKENIZER, Slow, build, greedy, ids, running

SYSTEM = "You are a helpful machine that answers every question. "
CHATS = [SYSTEM + text for text in ("What is a cat?", "What is a catalogue?", "Who is it?")]
WAYS = [greedy(18), GenerationConfig(max_new_tokens=18, temperature=0.9, top_k=20)]
BATCHED = ("gpt2", "llama", "qwen", "alibi", "relative")


def alone(model: Decoder, prompt: tuple[int, ...], way: GenerationConfig, seed: int = 3) -> list[int]:
    return complete(model, TOKENIZER, [prompt], way, generator=torch.Generator().manual_seed(seed))[0][0].tokens


def ask(engine: Engine, *prompts: tuple[int, ...], way: GenerationConfig, **options: object):
    """(tokens of each answer, cached tokens of each prompt)."""
    streams = [engine.submit(Request(prompt, way, seed=3, **options)) for prompt in prompts]
    return [[output.token for output in stream] for stream in streams], [stream.n_cached for stream in streams]


@pytest.mark.parametrize("shape", BATCHED)
@pytest.mark.parametrize("way", WAYS, ids=["greedy", "sampled"])
def test_a_next_turn_reads_what_is_new_and_is_answered_as_without_a_cache(shape: str, way: GenerationConfig) -> None:
    model, read = build(**SHAPES[shape], max_seq_len=256), []
    with running(model, slots=3, prefill_chunk=20) as engine:
        prompt, known = ids(CHATS[0]), 0
        for _ in range(3):
            n_read = len(read)
            hook = model.embed.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].shape[1]))
            [tokens], [n_cached] = ask(engine, prompt, way=way)
            hook.remove()
            assert tokens == alone(model, prompt, way)
            prefilled = sum(read[n_read:]) - (len(tokens) - 1)
            assert n_cached + prefilled == len(prompt)
            # all that the model has read and written, in whole blocks of 16
            assert n_cached == known // 16 * 16
            known = len(prompt) + len(tokens) - 1
            prompt = (*prompt, *tokens, *ids(" And then?"))


def test_prompts_with_one_beginning_at_the_same_time() -> None:
    model = build(max_seq_len=256)
    with running(model, slots=4, prefill_chunk=20) as engine:
        prompts = [ids(text) for text in CHATS * 2]
        for turn in range(2):
            answers, cached = ask(engine, *prompts, way=greedy(12))
            assert answers == [alone(model, prompt, greedy(12)) for prompt in prompts]
            assert turn == 0 or min(cached) >= 48
    assert not engine.model_runner.states
    assert not engine.scheduler.paused


@pytest.mark.parametrize("mib", [0.0, 1e-6, 0.06])
def test_answers_under_eviction(mib: float) -> None:
    model = build(max_seq_len=256)
    with running(model, slots=3, prefill_chunk=20, prefix_cache_mib=mib) as engine:
        for n in range(12):
            prompts = [ids(f"{n * k % 5} {text}") for k, text in enumerate(CHATS)]
            answers, cached = ask(engine, *prompts, way=greedy(6))
            assert answers == [alone(model, prompt, greedy(6)) for prompt in prompts]
            assert mib > 0.01 or not any(cached)
    blocks = engine.model_runner.prefix_blocks
    assert (blocks is None) == (mib == 0)
    if mib > 0.01:  # it is full, and no place is used twice
        assert 0.9 * mib * 2**20 < blocks.n_bytes <= mib * 2**20
        assert len({place for _, place in blocks.places.values()}) == len(blocks.places)


def test_adapters_never_share_blocks_nor_does_one_that_is_loaded_again(tmp_path: Path) -> None:
    texts = {}
    for n, name in enumerate(("one", "two")):
        model = peft.lora(build(max_seq_len=256), rank=4)
        torch.manual_seed(n)
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.5)
        peft.save_adapter(model, tmp_path / name, base="base")
        texts[name] = alone(model.eval(), ids(CHATS[0]), greedy(12))
    base = build(max_seq_len=256)
    texts[None] = alone(base, ids(CHATS[0]), greedy(12))
    with running(base, slots=3, adapters={name: str(tmp_path / name) for name in ("one", "two")}) as engine:
        for expected in (0, 64):
            for name, text in texts.items():
                assert ask(engine, ids(CHATS[0]), way=greedy(12), adapter=name) == ([text], [expected])
        engine.adapters.adapters["one"].number += 1000  # as if it were loaded anew
        assert ask(engine, ids(CHATS[0]), way=greedy(12), adapter="one")[1] == [0]


def test_cancelled_and_failed_requests_hold_nothing_and_failed_ones_are_not_kept() -> None:
    model, slow = build(max_seq_len=256), Slow()
    with running(model, slots=2, prefill_chunk=20) as engine:
        hook = model.embed.register_forward_pre_hook(slow)
        stream = engine.submit(Request(ids(CHATS[0]), greedy(50)))
        assert slow.entered.wait(20)
        stream.cancel()
        slow.gate.release(100)
        assert len(list(stream)) < 50
        assert stream.finish_reason == "cancelled"
        hook.remove()
        kept = len(engine.model_runner.prefix_blocks.places)
        assert kept == len(ids(CHATS[0])) // 16  # its prompt is right: it stays
        hook = model.embed.register_forward_hook(lambda _, __, out: out * float("nan"))
        failed = engine.submit(Request(ids(CHATS[2]), greedy(5)))
        assert list(failed) == []
        assert failed.finish_reason == "error"
        hook.remove()
        assert len(engine.model_runner.prefix_blocks.places) == kept
        assert ask(engine, ids(CHATS[2]), way=greedy(5))[0] == [alone(model, ids(CHATS[2]), greedy(5))]
        assert not engine.scheduler.running()
        assert not engine.model_runner.cache.first_columns


@pytest.mark.parametrize("shape", ["longformer", "t5"])
def test_models_whose_keys_depend_on_more_than_the_tokens_before_are_left_out(shape: str) -> None:
    model = build(**SHAPES[shape], max_seq_len=128)
    with running(model, slots=2) as engine:
        first, second = (ask(engine, ids(CHATS[0]), way=greedy(8)) for _ in range(2))
    assert first == second == ([alone(model, ids(CHATS[0]), greedy(8))], [0])
