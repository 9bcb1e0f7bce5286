"""OpenAI's Python client against the server: completions, chat, log-probabilities, usage and errors."""
# ruff: noqa: E402 (what is imported below needs what is asked for first)

import base64
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

openai = pytest.importorskip("openai", reason="needs pip install openai")
pytest.importorskip("fastapi", reason="needs pip install -e '.[serve]'")

from genai_pl.generation import encode_prompt
from genai_pl.serving.http.echo import token_texts
from tests.small_tokenizers import TOKENIZERS

HELLO = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def ai(client) -> "Iterator[openai.OpenAI]":
    with openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=0) as ai:
        yield ai


@pytest.fixture(scope="module")
def theirs(tiny: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(tiny), AutoTokenizer.from_pretrained(tiny)


def test_the_model_is_listed(ai) -> None:
    assert [model.id for model in ai.models.list()] == ["tiny"]
    assert ai.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="there is tiny"):
        ai.models.retrieve("other")


def test_a_completion_has_what_the_client_reads(ai) -> None:
    answer = ai.completions.create(model="tiny", prompt="Once", max_tokens=5, temperature=0)
    assert answer.object == "text_completion"
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (4, 5, 9)


def test_several_prompts_and_answers_are_numbered_in_order(ai) -> None:
    options = {"model": "tiny", "max_tokens": 8, "temperature": 1.3, "seed": 5}
    answer = ai.completions.create(prompt=["Once", "Twice"], n=2, **options)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    texts = [choice.text for choice in answer.choices]
    assert len(set(texts)) == 4
    assert answer.usage.prompt_tokens == 9
    alone = ai.completions.create(prompt="Twice", n=2, **options)
    assert [choice.text for choice in alone.choices] == texts[2:]


def test_a_top_k_of_every_token_is_none_as_in_vllm(ai) -> None:
    options = {"model": "tiny", "prompt": "Once", "max_tokens": 8, "temperature": 1.5, "seed": 5}
    texts = [
        ai.completions.create(**options, extra_body=extra).choices[0].text
        for extra in ({}, {"top_k": 0}, {"top_k": -1})
    ]
    assert len(set(texts)) == 1
    assert texts[0] != ai.completions.create(**options, extra_body={"top_k": 1}).choices[0].text
    with pytest.raises(openai.UnprocessableEntityError, match="top_k"):
        ai.completions.create(**options, extra_body={"top_k": -2})


def test_tokens_may_be_given_for_text(ai) -> None:
    options = {"model": "tiny", "max_tokens": 6, "temperature": 0}
    as_text = ai.completions.create(prompt="Once", **options).choices[0].text
    assert ai.completions.create(prompt=list(b"Once"), **options).choices[0].text == as_text
    assert ai.completions.create(prompt=[list(b"Once")], **options).choices[0].text == as_text
    with pytest.raises(openai.UnprocessableEntityError, match="token 999"):
        ai.completions.create(prompt=[999], **options)


def test_logprobs_are_those_of_the_model(ai, theirs) -> None:
    answer = ai.completions.create(model="tiny", prompt="Once", max_tokens=4, temperature=0, logprobs=3)
    model, _ = theirs
    ids = list(b"Once")
    for chosen, top in zip(
        answer.choices[0].logprobs.token_logprobs, answer.choices[0].logprobs.top_logprobs, strict=True
    ):
        with torch.no_grad():
            expected = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        assert chosen == pytest.approx(float(expected.max()), abs=1e-4)
        assert sorted(top.values(), reverse=True)[0] == pytest.approx(chosen)
        ids.append(int(expected.argmax()))


def test_no_end_token_comes_before_min_tokens(ai, theirs) -> None:
    model, tokenizer = theirs
    eos, ids = tokenizer.eos_token_id, torch.tensor([list(b"Once")])
    likely = {"sequence_bias": {(eos,): 100.0}, "do_sample": False, "max_new_tokens": 12, "pad_token_id": 0}
    options = {"model": "tiny", "prompt": "Once", "max_tokens": 12, "temperature": 0, "logit_bias": {str(eos): 100}}
    for least, extra in [(1, {}), (5, {"min_tokens": 5}), (12, {"ignore_eos": True})]:
        expected = model.generate(ids, min_new_tokens=0 if least == 1 else least, **likely)[0, 4:].tolist()
        answer = ai.completions.create(**options, logprobs=0, extra_body={**extra, "return_tokens_as_token_ids": True})
        assert answer.choices[0].logprobs.tokens == [f"token_id:{token}" for token in expected]
        assert answer.usage.completion_tokens == len(expected)
        assert answer.choices[0].finish_reason == ("length" if "ignore_eos" in extra else "stop")
    chat = {"model": "tiny", "messages": HELLO, "max_tokens": 7, "logit_bias": {str(eos): 100}}
    streamed = ai.chat.completions.create(
        **chat, stream=True, stream_options={"include_usage": True}, extra_body={"ignore_eos": True}
    )
    assert list(streamed)[-1].usage.completion_tokens == 7
    with pytest.raises(openai.UnprocessableEntityError, match=r"min_tokens=13: .* at most 12") as raised:
        ai.completions.create(**options, extra_body={"min_tokens": 13})
    assert raised.value.param == "min_tokens"
    # a prompt that leaves less room than that: the context ends the answer
    full = ai.completions.create(**{**options, "prompt": "x" * 120}, extra_body={"min_tokens": 12})
    assert (full.choices[0].finish_reason, full.usage.completion_tokens) == ("length", 8)


def test_the_chat_template_of_a_served_model_is_tried_once(tiny: Path, theirs, monkeypatch) -> None:
    from genai_pl.serving import tokenize_threads
    from tests.serving.servers import make_service, serving

    made = []

    class Counted(tokenize_threads.ChatTemplate):
        def __init__(self, tokenizer: object) -> None:
            made.append(tokenizer)
            super().__init__(tokenizer)

    monkeypatch.setattr(tokenize_threads, "ChatTemplate", Counted)
    _, tokenizer = theirs
    service = make_service(tiny, cache=None)
    with serving(service) as client:
        for n in range(3):
            turns = [{"role": "user", "content": "x" * n}]
            reply = client.post("/v1/chat/completions", json={"messages": turns, "max_tokens": 1})
            ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
            assert reply.json()["usage"]["prompt_tokens"] == len(ids)
    assert made == [service.tokenize_threads.tokenizers[service.tokenize_threads.short]]


def test_a_conversation_is_rendered_by_the_template(ai, theirs) -> None:
    _, tokenizer = theirs
    text = tokenizer.apply_chat_template(HELLO, tokenize=False, add_generation_prompt=True)
    chat = ai.chat.completions.create(model="tiny", messages=HELLO, max_tokens=6, temperature=0)
    plain = ai.completions.create(model="tiny", prompt=text, max_tokens=6, temperature=0)
    assert chat.object == "chat.completion"
    assert chat.choices[0].message.role == "assistant"
    assert chat.choices[0].message.content == plain.choices[0].text
    assert chat.usage.prompt_tokens == len(tokenizer(text)["input_ids"])
    parts = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
    ]
    again = ai.chat.completions.create(model="tiny", messages=parts, max_completion_tokens=6, temperature=0)
    assert again.choices[0].message.content == chat.choices[0].message.content


def test_a_stream_adds_up_to_the_answer_and_ends_with_its_cost(ai) -> None:
    options = {"model": "tiny", "messages": HELLO, "max_tokens": 12, "temperature": 1.0, "seed": 2, "n": 2}
    whole = ai.chat.completions.create(**options)
    chunks = list(ai.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[-1].choices == []
    cost, again = chunks[-1].usage, whole.usage  # the second time the prompt's beginning is cached
    assert (cost.prompt_tokens, cost.completion_tokens) == (again.prompt_tokens, again.completion_tokens)
    for choice in whole.choices:
        own = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert own[0].delta.role == "assistant"
        assert "".join(c.delta.content or "" for c in own) == choice.message.content
        assert [c.finish_reason for c in own if c.finish_reason] == [choice.finish_reason]


def test_logprobs_of_a_conversation_stream_like_they_come_whole(ai) -> None:
    options = {
        "model": "tiny",
        "messages": HELLO,
        "max_tokens": 5,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 2,
    }
    whole = ai.chat.completions.create(**options).choices[0].logprobs.content
    assert [len(entry.top_logprobs) for entry in whole] == [2] * len(whole)
    chunks = ai.chat.completions.create(**options, stream=True)
    streamed = [e for chunk in chunks for c in chunk.choices if c.logprobs for e in c.logprobs.content]
    assert [entry.logprob for entry in streamed] == [entry.logprob for entry in whole]
    assert [entry.token for entry in streamed] == [entry.token for entry in whole]


def test_a_stop_string_ends_the_answer(ai) -> None:
    options = {"model": "tiny", "prompt": "Once", "max_tokens": 30, "seed": 3, "temperature": 1.0}
    text = ai.completions.create(**options).choices[0].text
    stop = next(c for c in text[3:] if ord(c) < 128)
    for stops in (stop, [stop, "never said"]):
        answer = ai.completions.create(**options, stop=stops).choices[0]
        assert (answer.text, answer.finish_reason) == (text.split(stop)[0], "stop")


def test_embeddings_are_unit_vectors_whatever_their_encoding(ai, client) -> None:
    answer = ai.embeddings.create(model="tiny", input=["one text", "another"])  # the client asks for base64
    vectors = np.array([entry.embedding for entry in answer.data])
    assert vectors.shape == (2, 32)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx([1, 1], abs=1e-5)
    plain = client.post("/v1/embeddings", json={"input": "another"}).json()
    assert plain["data"][0]["embedding"] == pytest.approx(vectors[1].tolist(), abs=1e-6)
    encoded = client.post("/v1/embeddings", json={"input": "another", "encoding_format": "base64"}).json()
    assert np.frombuffer(base64.b64decode(encoded["data"][0]["embedding"]), "<f4") == pytest.approx(vectors[1])
    short = ai.embeddings.create(model="tiny", input="another", dimensions=4).data[0].embedding
    assert short == pytest.approx((vectors[1, :4] / np.linalg.norm(vectors[1, :4])).tolist(), abs=1e-5)


WRONG = {
    "model": (openai.NotFoundError, {"model": "gpt-5"}),
    "max_tokens": (openai.UnprocessableEntityError, {"max_tokens": 10**6}),
    "temperature": (openai.UnprocessableEntityError, {"temperature": -1}),
    "n": (openai.UnprocessableEntityError, {"n": 1000}),
    "tools": (openai.UnprocessableEntityError, {"tools": [{"type": "function", "function": {"name": "f"}}]}),
    "tool_choice": (openai.UnprocessableEntityError, {"tool_choice": "required"}),
    "presence_penalty": (openai.UnprocessableEntityError, {"presence_penalty": 2.5}),
}


@pytest.mark.parametrize("param", WRONG)
def test_errors_are_those_that_the_client_knows(param: str, ai) -> None:
    kind, option = WRONG[param]
    with pytest.raises(kind) as raised:
        ai.chat.completions.create(**{"model": "tiny", "messages": HELLO, **option})
    assert raised.value.param == param
    assert raised.value.body["message"]


def test_options_that_change_nothing_are_taken(ai) -> None:
    neutral = {"presence_penalty": 0, "tools": [], "user": "me", "store": False, "response_format": {"type": "text"}}
    assert ai.chat.completions.create(model="tiny", messages=HELLO, max_tokens=2, **neutral).choices


def test_a_message_without_text_is_refused_by_its_place(client) -> None:
    image = [{"type": "image_url", "image_url": {"url": "data:,"}}]
    reply = client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": image}]})
    assert reply.status_code == 422
    assert reply.json()["error"]["param"].startswith("messages.0.content")


def test_a_tokenizer_without_a_template_is_said(tmp_path: Path) -> None:
    from tests.serving.servers import make_service, serving, write_model

    with serving(make_service(write_model(tmp_path / "plain", template=False))) as client:
        reply = client.post("/v1/chat/completions", json={"messages": HELLO})
        assert reply.status_code == 400
        assert "no chat template" in reply.json()["error"]["message"]
        assert client.post("/v1/completions", json={"prompt": "x", "max_tokens": 1}).status_code == 200


def test_penalties_are_those_of_the_formula(ai, theirs) -> None:
    model, _ = theirs
    options = {"presence_penalty": 1.5, "frequency_penalty": 0.8}
    text = ai.completions.create(model="tiny", prompt="Once", max_tokens=20, temperature=0, **options).choices[0].text
    ids, counts = list(b"Once"), torch.zeros(model.config.vocab_size)
    for _ in range(20):
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1]
        token = int((logits - 0.8 * counts - 1.5 * (counts > 0)).argmax())
        counts[token] += 1
        ids.append(token)
    _, tokenizer = theirs
    assert text == tokenizer.decode(ids[4:], skip_special_tokens=True).rstrip("\ufffd")
    with pytest.raises(openai.UnprocessableEntityError) as raised:
        ai.completions.create(model="tiny", prompt="x", presence_penalty=2.1)
    assert raised.value.param == "presence_penalty"


def test_an_echoed_prompt_has_its_log_probabilities(ai, theirs) -> None:
    options = {"model": "tiny", "prompt": ["Once upon", "Two"], "echo": True, "logprobs": 3, "temperature": 0}
    model, tokenizer = theirs
    [once, two] = ai.completions.create(**options, max_tokens=0).choices
    assert (once.text, two.text, once.finish_reason) == ("Once upon", "Two", "length")
    ids = list(b"Once upon")
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    found = once.logprobs
    assert (found.token_logprobs[0], found.top_logprobs[0]) == (None, None)
    assert found.tokens == list("Once upon")
    assert found.text_offset == list(range(9))
    chosen = expected[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    assert found.token_logprobs[1:] == pytest.approx(chosen.tolist(), abs=1e-4)
    for row, top in zip(expected[:-1], found.top_logprobs[1:], strict=True):
        best = reversed(list(zip(*row.topk(3), strict=True)))  # of tokens with one text the likeliest is kept
        assert top == pytest.approx({tokenizer.decode([int(i)]): float(p) for p, i in best}, abs=1e-4)
    # with an answer after it, whole and in a stream
    [whole, _] = ai.completions.create(**options, max_tokens=3).choices
    assert whole.text.startswith("Once upon")
    assert whole.logprobs.token_logprobs[1:9] == pytest.approx(found.token_logprobs[1:], abs=1e-4)
    assert len(whole.logprobs.tokens) == len(whole.logprobs.text_offset) == 12
    chunks = [c for chunk in ai.completions.create(**options, max_tokens=3, stream=True) for c in chunk.choices]
    assert "".join(chunk.text for chunk in chunks if chunk.index == 0) == whole.text


def test_an_echoed_prompt_keeps_its_special_tokens(ai) -> None:
    prompt = "One<|endoftext|>two"
    [choice] = ai.completions.create(
        model="tiny", prompt=prompt, echo=True, logprobs=0, temperature=0, max_tokens=2
    ).choices
    assert choice.text.startswith(prompt)
    found = list(zip(choice.logprobs.text_offset, choice.logprobs.tokens, strict=True))[:7]
    assert found == [(0, "O"), (1, "n"), (2, "e"), (3, "<|endoftext|>"), (16, "t"), (17, "w"), (18, "o")]


@pytest.mark.parametrize("kind", ["byte", "byte_level_bpe", "sentencepiece_bpe"])
@pytest.mark.parametrize(
    "prompt", ["", "Hi", " two  spaces ", "naïve 日本", "a{end}", "a{end} b", "{start}Hi", "end \ufffd"]
)
def test_the_texts_of_an_echo_are_the_prompt(prompt: str, kind: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    prompt = prompt.format(start=tokenizer.bos_token or "", end=tokenizer.eos_token)
    tokens = encode_prompt(tokenizer, prompt)
    texts = token_texts(tokenizer, tokens, prompt)
    assert len(texts) == len(tokens)
    if kind == "sentencepiece_bpe" and prompt in (
        "a</s> b",
        "<s>Hi",
    ):  # the tokenizer puts a space after a special token
        prompt = prompt.replace(">", "> ")
    assert "".join(texts) == prompt
    if kind == "byte":  # ids say nothing of what was in front: all of them are spelled out
        assert "".join(token_texts(tokenizer, tokens, tokens)) == (prompt or tokenizer.eos_token).removesuffix("\ufffd")


@pytest.mark.parametrize("wrong", [{"max_tokens": 0}, {"echo": True, "suffix": "x"}, {"suffix": "x"}])
def test_an_echo_or_suffix_that_cannot_be_is_refused(wrong: dict, ai) -> None:
    with pytest.raises(openai.APIStatusError, match=r"echo|suffix") as raised:
        ai.completions.create(model="tiny", prompt="Once", **wrong)
    assert raised.value.status_code in (400, 422)


def test_a_suffix_is_put_before_the_middle(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from genai_pl.data import byte_tokenizer
    from genai_pl.data.tokenizer import FIM, add_missing_tokens
    from tests.serving.fake import FakeEngine
    from tests.serving.servers import make_service, serving, write_model

    wider = byte_tokenizer()
    add_missing_tokens(wider, ["fim"])
    folder = write_model(tmp_path / "filler", vocab_size=len(wider))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    add_missing_tokens(tokenizer, ["fim"])
    tokenizer.save_pretrained(folder)
    service = make_service(folder, cache=None)
    service.engine = FakeEngine(["b"])
    with serving(service) as client:
        reply = client.post("/v1/completions", json={"prompt": "a", "suffix": "c", "max_tokens": 1})
    assert reply.json()["choices"][0]["text"] == "b"
    prefix, middle, suffix = (service.tokenizer.get_vocab()[name] for name in FIM)
    assert service.engine.requests[0].input_ids == (prefix, ord("a"), suffix, ord("c"), middle)


def test_texts_become_tokens_and_tokens_text(client, theirs) -> None:
    _, tokenizer = theirs
    found = client.post("/tokenize", json={"prompt": "Zürich", "return_token_strs": True}).json()
    ids = tokenizer("Zürich")["input_ids"]
    assert (found["tokens"], found["count"], found["max_model_len"]) == (ids, len(ids), 128)
    assert found["token_strs"] == tokenizer.convert_ids_to_tokens(ids)
    assert client.post("/detokenize", json={"tokens": ids}).json() == {"prompt": "Zürich"}
    chat = client.post("/tokenize", json={"messages": HELLO}).json()["tokens"]
    assert chat == tokenizer.apply_chat_template(HELLO, add_generation_prompt=True, return_dict=False)
    assert client.post("/detokenize", json={"tokens": [99999]}).json()["error"]["param"] == "tokens"
