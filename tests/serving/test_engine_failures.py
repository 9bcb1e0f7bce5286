"""Failures and shutdown of the engine: a failure ends the requests that caused it, and no others."""

import threading
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from genai_pl import peft
from genai_pl.config.generation import GenerationConfig
from genai_pl.errors import ConfigError
from genai_pl.generation import complete, generate_text
from genai_pl.serving.engine.engine import Engine
from genai_pl.serving.engine.request import EngineObserver, QueueFull, Request
from tests.serving.engines import SHAPES, TOKENIZER, Slow, build, greedy, ids, running, text_of


def test_a_model_that_fails_ends_its_answers_and_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    model, broken = build(), threading.Event()

    def fail(*_: object) -> None:
        if broken.is_set():
            broken.clear()
            raise RuntimeError("a kernel died")

    with running(model, slots=2) as engine:
        expected = text_of(engine.submit(Request(ids("The cat"), greedy(10))))
        model.norm.register_forward_pre_hook(fail)
        failing = engine.submit(Request(ids("x"), greedy(60, min_new_tokens=60)))
        next(failing)
        broken.set()
        list(failing)
        assert failing.finish_reason == "error"
        broken.set()
        unread = engine.submit(Request(ids("y"), greedy(5)))
        assert (list(unread), unread.finish_reason) == ([], "error")
        assert text_of(engine.submit(Request(ids("The cat"), greedy(10)))) == expected
    assert "a kernel died" in caplog.text


SPOILED = {
    "draw": lambda state: setattr(state, "generator", object()),
    "penalty": lambda state: setattr(state, "seen_tokens", torch.ones(3, dtype=torch.bool)),
    "rules": lambda state: setattr(state, "banned_tokens", object()),
    "text": lambda state: setattr(state, "text", object()),
}


@pytest.mark.parametrize("part", SPOILED)
def test_what_fails_for_one_row_ends_it_alone(part: str, caplog: pytest.LogCaptureFixture) -> None:
    class Spoiler(EngineObserver):
        def step(self, batch_size: int) -> None:
            for state in engine.model_runner.states:
                if state.request.seed == 13 and len(state.output_ids) == 4:
                    SPOILED[part](state)

    model, way = build(), GenerationConfig(max_new_tokens=20, min_new_tokens=20, repetition_penalty=1.2)
    with running(model, slots=3, observer=Spoiler()) as engine:
        streams = [engine.submit(Request(ids("The cat"), way, seed)) for seed in (12, 13, 14)]
        results = [[output.token for output in stream] for stream in streams]
        assert [stream.finish_reason for stream in streams] == ["length", "error", "length"]
        assert text_of(engine.submit(Request(ids("x"), greedy(3)))) is not None
    assert "an answer ends, the others go on" in caplog.text
    assert len(results[1]) == 4
    for seed, tokens in ((12, results[0]), (14, results[2])):
        generator = torch.Generator().manual_seed(seed)
        assert tokens == complete(model, TOKENIZER, [ids("The cat")], way, generator=generator)[0][0].tokens


def test_a_pass_that_fails_ends_its_row_alone_where_each_has_its_own(caplog: pytest.LogCaptureFixture) -> None:
    class Spoiler(EngineObserver):
        def step(self, batch_size: int) -> None:
            for state in engine.model_runner.states:
                if state.request.input_ids == ids("x"):
                    state.cache = object()

    model = build(**SHAPES["longformer"])
    with running(model, slots=2, observer=Spoiler()) as engine:
        bad, good = (engine.submit(Request(ids(text), greedy(10, min_new_tokens=10))) for text in ("x", "The cat"))
        assert (len(list(bad)), bad.finish_reason) == (2, "error")
        assert text_of(good) == generate_text(model, TOKENIZER, ["The cat"], greedy(10, min_new_tokens=10))[0][0]
    assert "an answer ends, the others go on" in caplog.text


def test_others_use_the_model_between_steps_with_an_adapter_of_their_own(tmp_path: Path) -> None:
    model = peft.lora(build(), rank=4)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.5)
    peft.save_adapter(model, tmp_path / "a", base="base")
    row = torch.tensor([ids("It was a dark")])
    with torch.no_grad():
        expected = {None: build()(row), "a": model.eval()(row)}
    alone = generate_text(model, TOKENIZER, ["The cat"], greedy(40))[0][0]
    with running(build(), slots=2, adapters={"a": str(tmp_path / "a")}) as engine:
        stream = engine.submit(Request(ids("The cat"), greedy(40), adapter="a"))
        jobs = [(name, engine.run_between_steps(lambda: engine.model(row).clone(), name)) for name in (None, "a") * 4]
        for name, job in jobs:
            torch.testing.assert_close(job.result(20), expected[name], atol=1e-5, rtol=0)
        assert text_of(stream) == alone
        with pytest.raises(ZeroDivisionError):
            engine.run_between_steps(lambda: 1 / 0).result(20)
    with pytest.raises(QueueFull):
        engine.run_between_steps(lambda: None)


def test_logits_that_are_no_numbers_end_one_answer_only() -> None:
    model = build(tie_embeddings=False)
    with torch.no_grad():
        model.embed.weight[200] = float("nan")
    with running(model, slots=2) as engine:
        good = engine.submit(Request(ids("The cat"), greedy(20)))
        bad = engine.submit(Request((5, 200), greedy(20)))
        assert (list(bad), bad.finish_reason) == ([], "error")
        assert list(good)
    assert good.finish_reason in ("length", "stop")


def test_stop_drains_what_is_there_and_takes_no_more() -> None:
    engine = Engine(build(), TOKENIZER, slots=1)
    engine.start()
    streams = [engine.submit(Request(ids("x"), greedy(10, min_new_tokens=10))) for _ in range(3)]
    engine.stop(drain=True)
    assert [(len(list(s)), s.finish_reason) for s in streams] == [(10, "length")] * 3
    with pytest.raises(QueueFull):
        engine.submit(Request(ids("x"), greedy(1)))
    assert (engine.n_waiting, engine.n_running) == (0, 0)


def test_stop_without_drain_cancels_and_so_does_its_timeout() -> None:
    for options in ({"drain": False}, {"drain": True, "timeout": 0.05}):
        model, slow = build(), Slow()
        model.embed.register_forward_pre_hook(slow)
        engine = Engine(model, TOKENIZER, slots=1)
        engine.start()
        streams = [engine.submit(Request(ids("xyz"), greedy(50, min_new_tokens=50))) for _ in range(2)]
        assert slow.entered.wait(20)
        stopping = threading.Thread(target=engine.stop, kwargs=options)
        stopping.start()
        while not streams[0].is_cancelled:
            time.sleep(0.001)
        slow.gate.release(100)
        stopping.join(20)
        assert [(list(s) != [], s.finish_reason) for s in streams] == [(True, "cancelled"), (False, "cancelled")]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request((), greedy(1)), "the prompt is empty"),
        (Request((5,) * 65, greedy(1)), "the prompt has 65 tokens, the model reads at most 64"),
        (Request((5,), greedy(1), adapter="polite"), "adapter=polite is not loaded; there is: none"),
        (Request((100_000,), greedy(1)), "not among the model's"),
        (Request((5,), greedy(1, num_beams=2)), "no num_beams"),
    ],
)
def test_what_cannot_be_answered_is_refused_in_one_line(request_: Request, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Engine(build(), TOKENIZER).submit(request_)
