"""Continuous batching: requests of one batch are answered as each alone, and start, end and are cancelled independently."""

import asyncio
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

from genai_pl import peft
from genai_pl.config.generation import GenerationConfig
from genai_pl.generation import complete, generate_text
from genai_pl.serving.engine.engine import Engine
from genai_pl.serving.engine.request import EngineObserver, QueueFull, Request, TokenOutput, TokenStream
from tests.serving.engines import PROMPTS, SHAPES, TOKENIZER, build, greedy, ids, running, text_of
from tests.serving.servers import eventually


@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_answers_of_a_batch_are_those_of_each_prompt_alone(shape: str) -> None:
    model = build(**SHAPES[shape])
    with running(model, slots=3, prefill_chunk=5) as engine:
        streams = [engine.submit(Request(ids(p), greedy(6 + 5 * n))) for n, p in enumerate(PROMPTS)]
        results = [(text_of(stream), stream.finish_reason) for stream in streams]
    for n, (prompt, (text, finish_reason)) in enumerate(zip(PROMPTS, results, strict=True)):
        assert text == generate_text(model, TOKENIZER, [prompt], greedy(6 + 5 * n))[0][0]
        assert finish_reason in ("length", "stop")


def test_a_seed_gives_one_text_whatever_else_is_in_the_batch() -> None:
    model = build()
    ways = [
        GenerationConfig(max_new_tokens=20, temperature=0.9, top_k=20),
        GenerationConfig(max_new_tokens=20, temperature=1.2, top_p=0.9, repetition_penalty=1.3),
        GenerationConfig(max_new_tokens=20, min_p=0.05, no_repeat_ngram_size=2, min_new_tokens=15),
        greedy(20, bad_words=["e"]),
    ]
    with running(model, slots=4, prefill_chunk=3) as engine:
        requests = [(p, way, 7 + n) for n, (p, way) in enumerate(zip(PROMPTS * 2, ways * 3, strict=True))]
        streams = [engine.submit(Request(ids(p), way, seed)) for p, way, seed in requests]
        results = [[output.token for output in stream] for stream in streams]
    for (prompt, way, seed), tokens in zip(requests, results, strict=True):
        generator = torch.Generator().manual_seed(seed)
        assert tokens == complete(model, TOKENIZER, [ids(prompt)], way, generator=generator)[0][0].tokens


def test_rows_of_one_batch_have_adapters_of_their_own_or_none(tmp_path: Path) -> None:
    makers = {"lora": (peft.lora, {"rank": 4}), "ia3": (peft.ia3, {}), "prefix": (peft.prefix, {"n_tokens": 3})}
    alone: dict[str | None, str] = {None: generate_text(build(), TOKENIZER, ["The cat"], greedy(12))[0][0]}
    for n, (name, (make, options)) in enumerate(makers.items()):
        model = make(build(), **options)
        torch.manual_seed(n)
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, mean=0.3, std=0.5)
        peft.save_adapter(model, tmp_path / name, base="base")
        alone[name] = generate_text(model.eval(), TOKENIZER, ["The cat"], greedy(12))[0][0]
    assert len(set(alone.values())) == 4
    for names in (["lora", "ia3"], ["lora", "prefix"]):
        with running(build(), slots=3, adapters={name: str(tmp_path / name) for name in names}) as engine:
            order = [*names, None, names[0]]
            streams = [engine.submit(Request(ids("The cat"), greedy(12), adapter=name)) for name in order]
            assert [text_of(stream) for stream in streams] == [alone[name] for name in order]


def test_short_prompts_are_read_in_one_pass() -> None:
    model, lengths = build(), []
    model.embed.register_forward_pre_hook(lambda _, inputs: lengths.append(tuple(inputs[0].shape)))
    engine = Engine(model, TOKENIZER, slots=8, prefill_chunk=50)
    streams = [engine.submit(Request(ids(prompt), greedy(8))) for prompt in PROMPTS]
    engine.start()
    results = [text_of(stream) for stream in streams]
    engine.stop()
    n_tokens = [len(ids(prompt)) for prompt in PROMPTS]
    assert sum(n_tokens[:3]) <= 50 < sum(n_tokens[:4])
    assert lengths[0] == (1, sum(n_tokens[:3]))
    assert results == [generate_text(model, TOKENIZER, [prompt], greedy(8))[0][0] for prompt in PROMPTS]


def test_a_stop_string_ends_an_answer_and_nothing_of_it_is_shown() -> None:
    model = build()
    whole = generate_text(model, TOKENIZER, ["The cat"], greedy(30))[0][0]
    stop = whole[8:11]
    with running(model) as engine:
        stream = engine.submit(Request(ids("The cat"), greedy(30, stop=[stop])))
        assert text_of(stream) == whole[: whole.index(stop)]
    assert stream.finish_reason == "stop"


def test_an_answer_that_fills_the_context_ends_with_length() -> None:
    with running(build(), max_length=20) as engine:
        stream = engine.submit(Request(ids("The cat"), greedy(200, min_new_tokens=200)))
        n = len(list(stream))
    assert (stream.finish_reason, stream.n_generated) == ("length", n)
    assert len(ids("The cat")) + n == 21  # nobody reads the last one


def test_logprobs_are_the_models_own() -> None:
    model = build()
    with running(model) as engine:
        stream = engine.submit(Request(ids("It was"), GenerationConfig(max_new_tokens=5, temperature=0.5), 1, None, 3))
        outputs = list(stream)
    row = torch.tensor([[*ids("It was"), *(output.token for output in outputs)]])
    logprobs = model(row)[0].log_softmax(-1)[len(ids("It was")) - 1 :]
    for output, expected in zip(outputs, logprobs, strict=False):
        assert output.logprob == pytest.approx(expected[output.token].item(), abs=1e-4)
        best = expected.topk(3)
        assert [token for token, _ in output.top] == best.indices.tolist()
        assert [p for _, p in output.top] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_a_cancelled_answer_frees_its_slot_for_the_next_one() -> None:
    with running(build(), slots=1) as engine:
        long = engine.submit(Request(ids("x"), greedy(60, min_new_tokens=60)))
        next(long)
        other = engine.submit(Request(ids("y"), greedy(3)))
        long.cancel()
        assert len(list(other)) <= 3
        list(long)
    assert long.finish_reason in ("cancelled", "length")
    assert other.finish_reason in ("length", "stop")


def test_cancelled_late_and_waiting_requests_end_without_a_slot() -> None:
    engine = Engine(build(), TOKENIZER, slots=1)
    late = engine.submit(Request(ids("x"), greedy(5), deadline=time.monotonic() - 1))
    cancelled = engine.submit(Request(ids("x"), greedy(5)))
    cancelled.cancel()
    engine.start()
    assert (list(late), late.finish_reason) == ([], "deadline")
    assert (list(cancelled), cancelled.finish_reason) == ([], "cancelled")
    engine.stop()


def test_requests_beyond_the_queue_are_told_to_come_again() -> None:
    engine = Engine(build(), TOKENIZER, slots=1, queue_size=2)
    streams = [engine.submit(Request(ids("x"), greedy(3))) for _ in range(2)]
    assert engine.n_waiting == 2
    with pytest.raises(QueueFull) as busy:
        engine.submit(Request(ids("x"), greedy(3)))
    assert busy.value.retry_after > 0
    engine.start()
    assert all(text_of(stream) is not None for stream in streams)
    engine.stop()


def test_a_long_prompt_is_read_while_others_go_on() -> None:
    model, lengths = build(max_seq_len=64), []
    model.embed.register_forward_pre_hook(lambda _, inputs: lengths.append(tuple(inputs[0].shape)))
    with running(model, slots=2, prefill_chunk=8) as engine:
        first = engine.submit(Request(ids("x"), greedy(50, min_new_tokens=50)))
        next(first), next(first)  # so that the turn in which it was read is over
        list(engine.submit(Request(tuple(range(3, 51)), greedy(2))))
        list(first)
    chunks = [n for n, (_, T) in enumerate(lengths) if T == 8]
    assert len(chunks) == 6
    assert all(
        b - a >= 2 for a, b in pairwise(chunks)
    )  # a step of the other between two, more where steps are owed time


def test_many_readers_in_one_event_loop_get_their_own_answers() -> None:
    model = build()

    async def read(engine: Engine, prompt: str) -> str:
        return "".join([output.text async for output in engine.submit(Request(ids(prompt), greedy(15)))])

    async def main() -> list[str]:
        with running(model, slots=2) as engine:
            return await asyncio.gather(*(read(engine, prompt) for prompt in PROMPTS))

    assert asyncio.run(main()) == [generate_text(model, TOKENIZER, [p], greedy(15))[0][0] for p in PROMPTS]


def test_a_reader_that_is_gone_keeps_nobody() -> None:
    stream = TokenStream(lambda: None)

    async def begin() -> None:
        task = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        task.cancel()

    asyncio.run(begin())
    stream.put(TokenOutput("a", 1, None, ()))  # its loop is closed
    assert next(stream).text == "a"


def test_an_idle_engine_frees_its_batch_and_answers_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    from genai_pl.serving.engine import idle_memory

    returned = []
    monkeypatch.setattr(idle_memory, "IDLE_SECONDS", 0.02)
    with monkeypatch.context() as patched, running(build(), slots=2) as engine:
        patched.setattr(idle_memory, "return_freed_memory", lambda: returned.append(True))
        request = Request(ids(PROMPTS[0]), greedy(8))
        first = text_of(engine.submit(request))
        assert eventually(lambda: engine.model_runner.cache.k is None and returned)
        assert text_of(engine.submit(request)) == first
    idle_memory.return_freed_memory()  # whatever the C library is


def test_the_observer_is_told_of_every_token_and_every_end() -> None:
    class Counting(EngineObserver):
        def __init__(self) -> None:
            self.events: list[str] = []
            self.ends: list[tuple[str, int, int]] = []

        def queued(self) -> None:
            self.events.append("queued")

        def started(self, waited_s: float) -> None:
            self.events.append("started")

        def first_token(self, seconds: float) -> None:
            self.events.append("first")

        def token(self, seconds_since_last: float) -> None:
            self.events.append("token")

        def finished(self, reason: str, n_prompt: int, n_generated: int) -> None:
            self.ends.append((reason, n_prompt, n_generated))

        def step(self, batch_size: int) -> None:
            assert 1 <= batch_size <= 2

    observer = Counting()
    with running(build(), slots=2, observer=observer) as engine:
        streams = [engine.submit(Request(ids("ab"), greedy(4, min_new_tokens=4))) for _ in range(3)]
        assert [len(list(stream)) for stream in streams] == [4] * 3
    counts = {name: observer.events.count(name) for name in set(observer.events)}
    assert counts == {"queued": 3, "started": 3, "first": 3, "token": 9}
    assert observer.ends == [("length", 2, 4)] * 3
