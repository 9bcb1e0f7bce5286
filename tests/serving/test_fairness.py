"""Fairness: clients take turns, work is divided into slices, and a client that leaves costs nothing more."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path

import pytest
import torch

pytest.importorskip("fastapi", reason="needs pip install -e '.[serve]'")

from genai_pl.serving.engine.engine import Engine
from genai_pl.serving.engine.request import QueueFull, Request
from genai_pl.serving.engine.scoring_queue import ScoringQueue
from genai_pl.serving.errors import ApiError
from genai_pl.serving.fair_queue import CLIENT, FairLock, FairQueue, Full, network
from genai_pl.serving.settings import Limits
from genai_pl.serving.tokenize_threads import SHORT, FairThread, TokenizeThreads
from tests.serving.engines import TOKENIZER, build, greedy, ids, text_of
from tests.serving.servers import make_service, serving, write_model
from tests.serving.test_vectors import SMALL, encoder, expected


def test_clients_take_turns_and_each_has_its_own_order() -> None:
    queue: FairQueue[str] = FairQueue(100)
    for item in ("a1", "a2", "a3", "b1", "b2", "c1"):
        queue.add(item[0], item)
    assert list(queue) == ["a1", "b1", "c1", "a2", "b2", "a3"]
    order = []
    while len(queue):
        client, item = queue.peek()
        queue.dequeue(client, item)
        order.append(item)
        if item == "b1":
            queue.add("d", "d1")
    assert order == ["a1", "b1", "c1", "a2", "b2", "d1", "a3"]


def test_in_a_full_queue_the_greediest_makes_room() -> None:
    queue: FairQueue[str] = FairQueue(4)
    assert [queue.add("a", item) for item in ("a1", "a2", "a3", "a4")] == [None] * 4
    assert not queue.accepts("a")
    with pytest.raises(Full):
        queue.add("a", "a5")
    assert queue.add("b", "b1") == "a4"  # the last one came last
    assert queue.add("b", "b2") == "a3"
    with pytest.raises(Full):
        queue.add("b", "b3")  # both have the same now
    assert list(queue) == ["a1", "b1", "a2", "b2"]
    assert queue.remove("a", "a1")
    assert not queue.remove("a", "a1")
    assert queue.add("c", "c1") is None


def test_addresses_of_one_customer_are_one_client() -> None:
    assert network("2001:db8:1:2:3::4") == network("2001:db8:1:2:ffff::9") != network("2001:db8:1:3::4")
    assert network("10.0.0.1") != network("10.0.0.2")
    assert network("a name") == "a name"


def test_waiting_rows_are_admitted_client_by_client() -> None:
    engine = Engine(build(), TOKENIZER, slots=1, queue_size=8)
    for n in range(4):
        engine.submit(Request(ids(f"a{n}"), greedy(2), client="a"))
    engine.submit(Request(ids("b0"), greedy(2), client="b"))
    states = [state for _ in range(5) for state in engine.scheduler.dequeue(engine.scheduler.in_turn()[:1])]
    assert [bytes(state.request.input_ids).decode() for state in states] == ["a0", "b0", "a1", "a2", "a3"]


def test_a_place_in_the_queue_is_free_as_soon_as_its_client_has_left() -> None:
    engine = Engine(build(), TOKENIZER, slots=1, queue_size=2)  # nothing runs that could tidy up
    for _ in range(50):
        engine.submit(Request(ids("x"), greedy(2), client="comes and leaves")).cancel()
    assert engine.n_waiting == 0
    gone = engine.submit(Request(ids("x"), greedy(2)))
    gone.cancel()
    assert gone.finish_reason == "cancelled"


def test_who_has_less_in_a_full_queue_gets_in_and_the_greedy_is_told() -> None:
    engine = Engine(build(), TOKENIZER, slots=1, queue_size=3)
    greedy_ones = [engine.submit(Request(ids("x"), greedy(2), client="a")) for _ in range(3)]
    with pytest.raises(QueueFull):
        engine.submit(Request(ids("x"), greedy(2), client="a"))
    patient = engine.submit(Request(ids("y"), greedy(2), client="b"))
    assert [stream.finish_reason for stream in greedy_ones] == [None, None, "busy"]
    engine.start()
    text_of(patient)
    engine.stop()
    assert patient.finish_reason in ("stop", "length")


def test_a_client_whose_request_had_to_make_room_is_told_to_come_again(tiny: Path) -> None:
    from tests.serving.fake import FakeEngine

    service = make_service(tiny, cache=None)
    service.engine = FakeEngine([], "busy")
    with serving(service) as client:
        reply = client.post("/generate", json={"prompt": "x"})
    assert reply.status_code == 429
    assert reply.headers["retry-after"]


def test_clients_take_turns_by_what_their_requests_cost() -> None:
    queue: FairQueue[tuple[str, int]] = FairQueue(100, lambda item: item[1])
    for _ in range(3):
        queue.add("heavy", ("heavy", 40))
    for _ in range(12):
        queue.add("light", ("light", 10))
    order = []
    while len(queue):
        assert next(iter(queue)) == queue.peek()[1]
        client, item = queue.peek()
        queue.dequeue(client, item)
        order.append(client[0])
    assert "".join(order) == "lllhl" * 3  # 40 tokens of each at a time


def test_what_was_not_written_after_all_counts_for_nothing() -> None:
    queue: FairQueue[tuple[str, int]] = FairQueue(100, lambda item: item[1])
    queue.add("a", ("a1", 100))
    queue.dequeue("a", ("a1", 100))
    queue.refund("a", 95)
    queue.add("a", ("a2", 100))
    queue.add("b", ("b1", 190))
    assert queue.peek() == ("a", ("a2", 100))


def test_clients_that_come_and_go_leave_nothing_in_the_queue() -> None:
    queue: FairQueue[str] = FairQueue(10)
    for n in range(5000):
        queue.add(f"client {n}", "x")
        queue.dequeue(*queue.peek())
    assert len(queue) == 0
    assert len(queue._finish_tags) < 200


def submit_to(engine: Engine, name: str, n: int, tokens: int, **options: object) -> list:
    group = object()
    return [engine.submit(Request(ids(name), greedy(tokens), group=group, **options)) for _ in range(n)]


def decoding_prompts(engine: Engine) -> list[str]:
    """The prompts in the decode batch, once every request that may start has started."""
    while engine.n_waiting and engine.n_running < engine.scheduler.max_running:
        before = engine.n_running
        engine.prefill()
        if engine.n_running == before:
            break
    return [bytes(state.request.input_ids).decode() for state in engine.model_runner.states]


def test_as_many_answers_as_there_are_slots_are_written_together() -> None:
    engine = Engine(build(), TOKENIZER, slots=4, queue_size=50)
    submit_to(engine, "four", 4, 20)
    assert decoding_prompts(engine) == ["four"] * 4


def test_a_small_request_is_answered_beside_one_that_has_all_slots() -> None:
    engine = Engine(build(), TOKENIZER, slots=4, queue_size=50)
    submit_to(engine, "heavy", 16, 40)
    assert decoding_prompts(engine) == ["heavy"] * 4  # none has a spare place beside its own
    submit_to(engine, "as long", 1, 40)
    assert decoding_prompts(engine) == ["heavy"] * 4  # it would have the place longer than it waits for a slot
    submit_to(engine, "small", 1, 2)
    assert decoding_prompts(engine) == ["heavy"] * 4 + ["small"]


def test_a_client_for_which_nothing_runs_has_a_spare_place() -> None:
    engine = Engine(build(), TOKENIZER, slots=8, queue_size=99)
    for _ in range(4):
        submit_to(engine, "heavy", 16, 40, client="a")
    assert decoding_prompts(engine) == ["heavy"] * 8
    submit_to(engine, "b", 2, 50, client="b")
    submit_to(engine, "c", 1, 50, client="c")
    assert sorted(decoding_prompts(engine)) == ["b", "c"] + ["heavy"] * 8


def test_one_address_with_many_answers_does_not_starve_patient_clients() -> None:
    """In steps of the engine: small requests of a patient client take about as many as without others."""
    with torch.inference_mode():
        engine = Engine(build(max_seq_len=512), TOKENIZER, slots=8, queue_size=64)
        for _ in range(4):
            submit_to(engine, "x", 16, 400, client="greedy")
        steps = []
        for _ in range(10):
            stream, n = submit_to(engine, "y", 1, 8, client="patient")[0], 0
            while stream.finish_reason is None and n < 500:
                engine.step()
                n += 1
                while stream._outputs:
                    next(stream)
            steps.append(n)
    assert max(steps) <= 12, steps


def test_a_short_prompt_does_not_wait_for_a_long_one() -> None:
    model, read = build(), []
    model.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0].shape[1]))
    features = model.features
    model.features = lambda input_ids, *a, **k: (read.append(input_ids.shape[1]), features(input_ids, *a, **k))[1]
    engine = Engine(model, TOKENIZER, slots=4, prefill_chunk=5)
    long = engine.submit(Request(tuple(range(60, 118)), greedy(2)))
    short = engine.submit(Request(ids("abc"), greedy(1)))
    engine.start()
    assert [len(text_of(stream)) >= 0 for stream in (short, long)] == [True, True]
    engine.stop()
    assert 3 in read[:4]  # the long one alone has twelve chunks
    assert sum(n for n in read if n > 1) >= 58


def test_a_long_prompt_does_not_wait_for_short_ones_for_ever() -> None:
    engine = Engine(build(), TOKENIZER, slots=2, prefill_chunk=5, queue_size=64)
    long = engine.submit(Request(tuple(range(60, 118)), greedy(1)))
    short = [engine.submit(Request(ids("abcde"), greedy(1))) for _ in range(60)]
    order = []
    for name, stream in (("long", long), *((n, one) for n, one in enumerate(short))):
        stream.close = lambda reason, name=name, close=stream.close: (order.append(name), close(reason))
    engine.start()
    for stream in (long, *short):
        text_of(stream)
    engine.stop()
    assert 5 < order.index("long") < 30  # twelve chunks, and short ones in between


def test_answers_go_on_however_many_prompts_come() -> None:
    """A prefill chunk is followed by decode steps for half of its time, by a clock that the test controls."""
    import genai_pl.serving.engine.engine as module

    engine = Engine(build(), TOKENIZER, slots=2, prefill_chunk=8)
    clock, turns = [0.0], []

    class Clock:
        @staticmethod
        def monotonic() -> float:
            return clock[0]

    def read() -> None:
        turns.append("read")
        clock[0] += 1.0

    def step() -> None:
        turns.append("step")
        clock[0] += 0.1

    engine.model_runner.states = [object()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "time", Clock)
        patch.setattr(engine, "prefill", read)
        patch.setattr(engine, "decode", step)
        patch.setattr(engine, "_finish_stopped", lambda: None)
        for _ in range(15):
            engine.step()
    assert turns.count("step") == 15
    assert 2 <= turns.count("read") <= 4


def counting(n: int, seen: list, name: str = "") -> Iterator[None]:
    for k in range(n):
        seen.append((name, k))
        yield
    return n


def test_passes_take_turns_slice_by_slice() -> None:
    seen: list[tuple[str, int]] = []

    async def use() -> list[int]:
        scoring_queue = ScoringQueue(None, queue_size=8, timeout=20)
        heavy = asyncio.ensure_future(scoring_queue.run(counting(50, seen, "heavy")))
        await asyncio.sleep(0)
        small = asyncio.ensure_future(scoring_queue.run(counting(1, seen, "small")))
        results = await asyncio.gather(heavy, small)
        scoring_queue.close()
        return results

    assert asyncio.run(use()) == [50, 1]
    assert seen.index(("small", 0)) <= 2


def test_a_pass_that_nobody_waits_for_ends_with_its_slice() -> None:
    seen: list[tuple[str, int]] = []
    entered, gate = threading.Event(), threading.Event()

    def slices() -> Iterator[None]:
        entered.set()
        assert gate.wait(20)
        yield
        seen.append(("never", 0))
        yield

    async def use() -> int:
        scoring_queue = ScoringQueue(None, queue_size=8, timeout=20)
        gone = asyncio.ensure_future(scoring_queue.run(slices()))
        await asyncio.to_thread(entered.wait, 20)
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        gate.set()
        results = await scoring_queue.run(counting(3, seen, "next"))
        scoring_queue.close()
        return results

    assert asyncio.run(use()) == 3
    assert [name for name, _ in seen] == ["next"] * 3


def test_passes_that_take_too_long_or_are_too_many_are_refused() -> None:
    async def use() -> list[int]:
        gate = threading.Event()

        def slices() -> Iterator[None]:
            gate.wait(20)
            yield

        scoring_queue, statuses = ScoringQueue(None, queue_size=1, timeout=0.2), []
        requests = [asyncio.ensure_future(scoring_queue.run(slices())) for _ in range(3)]
        for one in requests:
            try:
                await one
            except ApiError as error:
                statuses.append(error.status)
        gate.set()
        scoring_queue.close()
        return statuses

    assert asyncio.run(use()) == [504, 504, 429]


def test_answers_grow_between_the_slices_of_a_pass_with_an_adapter() -> None:
    engine = Engine(build(), TOKENIZER, slots=2)
    engine.adapters.adapters["a"] = engine  # requests choose among some: passes are done in the engine's thread
    engine.adapters.selected = lambda names: nullcontext()
    grown = []

    def slices() -> Iterator[None]:
        for _ in range(5):
            assert threading.current_thread().name == "engine"
            grown.append(stream.n_generated)
            yield

    stream = engine.submit(Request(ids("x"), greedy(50, min_new_tokens=50)))
    engine.start()

    async def use() -> None:
        await ScoringQueue(engine, queue_size=8, timeout=20).run(slices(), adapter="a")

    asyncio.run(use())
    engine.stop(drain=False)
    assert all(after > before or before == 50 for before, after in pairwise(grown)), grown


def test_a_text_of_a_client_that_has_left_is_not_read() -> None:
    done = []

    async def use() -> None:
        thread, gate = FairThread("a", queue_size=16, timeout=20), threading.Event()
        first = asyncio.ensure_future(thread.run(gate.wait, 20))
        await asyncio.sleep(0)
        gone = [asyncio.ensure_future(thread.run(done.append, "gone")) for _ in range(8)]
        patient = asyncio.ensure_future(thread.run(done.append, "patient"))
        await asyncio.sleep(0)
        for one in gone:
            one.cancel()
        await asyncio.gather(*gone, return_exceptions=True)
        gate.set()
        await asyncio.gather(first, patient)
        thread.close()

    asyncio.run(use())
    assert done == ["patient"]


def test_a_turn_that_was_given_to_somebody_who_left_is_passed_on() -> None:
    async def use() -> str:
        lock = FairLock(4)
        order = []

        async def have(name: str) -> None:
            async with lock.acquire():
                order.append(name)

        async with lock.acquire():
            tasks = [asyncio.ensure_future(have(name)) for name in ("a", "b", "c")]
            await asyncio.sleep(0)
        tasks[0].cancel()  # it has its turn, and has not begun
        await asyncio.gather(*tasks, return_exceptions=True)
        assert not lock.is_taken
        return "".join(order)

    assert asyncio.run(use()) == "bc"


def test_texts_are_read_client_by_client_and_the_greediest_is_refused() -> None:
    done = []

    async def use() -> list[object]:
        thread, gate = FairThread("a", queue_size=4, timeout=20), threading.Event()
        first = asyncio.ensure_future(thread.run(gate.wait, 20))
        await asyncio.sleep(0)
        requests = []
        for name in ("a1", "a2", "a3", "a4", "b1"):
            CLIENT.set(name[0])
            requests.append(asyncio.ensure_future(thread.run(done.append, name)))
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        gate.set()
        results = await asyncio.gather(*requests, return_exceptions=True)
        await first
        thread.close()
        return results

    results = asyncio.run(use())
    assert done == ["a1", "b1", "a2", "a3"]
    assert [getattr(one, "status", one) for one in results] == [None, None, None, 429, None]


def test_short_texts_do_not_wait_for_long_ones() -> None:
    async def use() -> str:
        threads, gate = TokenizeThreads(TOKENIZER, queue_size=4, timeout=20), threading.Event()
        long = asyncio.ensure_future(threads.encode(lambda tokenizer: gate.wait(20), size=SHORT + 1))
        await asyncio.sleep(0)
        token_ids = await threads.encode(lambda tokenizer, text: tokenizer(text)["input_ids"], "ab", size=2)
        gate.set()
        await long
        threads.close()
        return bytes(token_ids).decode()

    assert asyncio.run(use()) == "ab"


def test_a_request_has_no_more_tokens_than_it_may(tiny: Path) -> None:
    with serving(make_service(tiny, limits=Limits(max_input_tokens=100))) as client:
        requests = (
            ("/v1/embeddings", "input", ["x" * 50] * 2),  # and an end each
            ("/v1/embeddings", "input", [[7] * 51] * 2),
            ("/v1/embeddings", "input", ["é" * 800, "x"]),
            ("/score", "text", ["x" * 50] * 3),
            ("/score", "text", "x" * 801),
        )
        for path, param, value in requests:
            reply = client.post(path, json={param: value})
            assert reply.status_code == 422, reply.text
            assert reply.json()["error"]["param"] == param
            assert "max_input_tokens" in reply.json()["error"]["message"]
        assert client.post("/v1/embeddings", json={"input": ["x" * 49] * 2}).status_code == 200
        assert client.post("/score", json={"text": ["x" * 50] * 2}).status_code == 200


def test_a_text_that_cannot_fit_needs_no_tokenizer(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service = make_service(tiny)
    monkeypatch.setattr(service.tokenize_threads, "encode", lambda *a, **k: pytest.fail("it was read"))
    with serving(service) as client:
        text = "x" * (128 * service.longest + 1)
        for path, body in (
            ("/generate", {"prompt": text}),
            ("/v1/completions", {"prompt": ["a", text][1]}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": text}]}),
        ):
            reply = client.post(path, json=body)
            assert reply.status_code == 400
            assert "128 tokens" in reply.json()["error"]["message"]


@pytest.mark.parametrize("pooling", ["mean", "last", "cls"])
@pytest.mark.parametrize("shape", ["encoder", "decoder"])
def test_vectors_in_slices_are_those_of_transformers(
    shape: str, pooling: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("genai_pl.serving.engine.scoring.CPU_TOKENS", 7)  # some texts have more
    folder = tiny if shape == "decoder" else encoder(tmp_path / "bert")
    texts = ["A short text", "something longer than that, with a comma", "x", "yz", "five"]
    with serving(make_service(folder, pooling=pooling)) as client:
        results = client.post("/v1/embeddings", json={"input": texts}).json()
    vectors = torch.tensor([entry["embedding"] for entry in results["data"]])
    torch.testing.assert_close(vectors, expected(folder, pooling, texts), atol=1e-5, rtol=0)


def test_scores_in_slices_are_those_of_transformers(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    monkeypatch.setattr("genai_pl.serving.engine.scoring.CPU_TOKENS", 7)
    model = AutoModelForCausalLM.from_pretrained(tiny)

    def logprob(text: bytes, n_given: int) -> float:
        ids = torch.tensor([list(text)])
        with torch.no_grad():
            logprobs = model(ids).logits[0, :-1].log_softmax(-1)
        return float(logprobs.gather(1, ids[0, 1:, None])[n_given - 1 :].sum())

    prompts, texts = ["Once", "It was a dark and stormy night", "a"], [" upon a time there was", " x", "b"]
    with serving(make_service(tiny)) as client:
        results = client.post("/score", json={"prompt": prompts, "text": texts}).json()["scores"]
        alone = client.post("/score", json={"text": "Once upon a time there was"}).json()["scores"]
    assert alone[0]["score"] == pytest.approx(logprob(b"Once upon a time there was", 1), abs=1e-3)
    for entry, prompt, text in zip(results, prompts, texts, strict=True):
        assert entry["score"] == pytest.approx(logprob((prompt + text).encode(), len(prompt)), abs=1e-3)
        assert entry["n_tokens"] == len(text)
    folder = write_model(tmp_path / "reward", head="score", **SMALL)
    judge = AutoModelForSequenceClassification.from_pretrained(folder)
    with serving(make_service(folder)) as client:
        results = client.post("/score", json={"prompt": prompts, "text": texts}).json()["scores"]
    for entry, prompt, text in zip(results, prompts, texts, strict=True):
        with torch.no_grad():
            score = float(judge(torch.tensor([[*(prompt + text).encode(), 256]])).logits)
        assert entry["score"] == pytest.approx(score, abs=1e-5)
