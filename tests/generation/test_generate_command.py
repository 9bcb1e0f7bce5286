"""The output of `generate.py` beside plain samples."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from genai_pl.cli.generate import print_scores
from genai_pl.config.enums import Head
from genai_pl.loading import Loaded
from genai_pl.models import Decoder, save_pretrained


@pytest.fixture
def folder(small_model: Callable[..., Decoder], byte_tokenizer, tmp_path: Path) -> Path:
    """A Hugging Face folder of a random GPT-2 with a byte tokenizer."""
    path = tmp_path / "model"
    ids = {"bos_token_id": None, "eos_token_id": 256, "pad_token_id": None}
    save_pretrained(small_model(), path, token_ids=ids)
    byte_tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def theirs(folder: Path) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


MISTAKES = {
    "dtype=int2": "dtype=int2: expected int8 or int4, or null for the weights of precision=",
    "dtype=int8 precision=bf16_true": "dtype=int8 computes in float32: leave precision out",
    "dtype=int4 precision=bf16_true": "dtype=int4 computes in float32: leave precision out",
    "dtype=int8 precision=bf16": "dtype=int8 computes in float32: leave precision out",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_dtype_that_cannot_be_is_one_line(mistake, folder, command):
    result = command("generate", "checkpoint=model", "prompt=ab", *mistake.split())
    assert result.status in (1, 2)
    assert result.err == f"error: {MISTAKES[mistake]}\n"


@pytest.mark.parametrize(("dtype", "error"), [("int8", 2e-2), ("int4", 0.1)])
def test_codes_give_nearly_the_likelihoods_of_float32(dtype, error, folder, command):
    exact, rounded = (lines(command, "prompt=abcdefgh", "score=true", f"dtype={one}")[0] for one in ("null", dtype))
    assert rounded["logprob"] != exact["logprob"]
    assert rounded["logprob"] == pytest.approx(exact["logprob"], rel=error)
    written = command(
        "generate", "checkpoint=model", "prompt=abcdefgh", f"dtype={dtype}", "generation.max_new_tokens=5"
    )
    assert written.status == 0
    assert written.out.startswith("abcdefgh")


def lines(command, *arguments: str) -> list[dict]:
    result = command("generate", "checkpoint=model", *arguments)
    assert (result.status, result.err) == (0, "")
    return [json.loads(line) for line in result.out.splitlines()]


def test_beams_are_printed_the_best_first(folder, theirs, byte_tokenizer, command):
    options = ("generation=beam", "generation.num_return=2", "generation.max_new_tokens=6", "generation.num_beams=3")
    result = command("generate", "checkpoint=model", "prompt=ab", *options)
    ids = torch.tensor([list(b"ab")])
    expected = theirs.generate(
        ids, attention_mask=torch.ones_like(ids), num_beams=3, num_return_sequences=2, max_new_tokens=6, do_sample=False,
        pad_token_id=256,
    )  # fmt: skip
    texts = [byte_tokenizer.decode(row, skip_special_tokens=True).rstrip("\ufffd") for row in expected]
    assert result.out == "".join(f"{text}\n{'-' * 40}\n" for text in texts)
    assert command("generate", "checkpoint=model", "prompt=ab", *options, "num_samples=2").err == (
        "error: num_samples=2 has no use with beams: set generation.num_return\n"
    )


def test_log_probabilities_of_samples_are_those_of_transformers(folder, theirs, command):
    rows = lines(command, "prompt=ab", "logprobs=true", "num_samples=2", "generation.max_new_tokens=5")
    assert len(rows) == 2
    for line in rows:
        assert line["prompt"] == "ab"
        assert len(line["tokens"]) == len(line["logprobs"]) == 5
    samples = lines(
        command, "prompt=ab", "logprobs=true", "generation=greedy", "generation.max_new_tokens=5",
        "generation.prefix=xyzab",
    )  # fmt: skip
    row = list(b"abxyzab")
    with torch.no_grad():
        logprobs = theirs(torch.tensor([row])).logits[0].log_softmax(-1)
    expected = [logprobs[n, row[n + 1]].item() for n in range(1, 6)]
    assert samples[0]["text"] == "xyzab"
    assert samples[0]["logprobs"] == pytest.approx(expected, rel=1e-4)


def test_scores_are_those_of_transformers(folder, theirs, command, tmp_path):
    (tmp_path / "prompts.txt").write_text("hello\nsome other text\n")
    rows = lines(command, "prompt_file=prompts.txt", "score=true")
    for line, text in zip(rows, ("hello", "some other text"), strict=True):
        ids = torch.tensor([list(text.encode())])
        with torch.no_grad():
            mean = -theirs(ids, labels=ids).loss.item()
        assert line["prompt"] == text
        assert line["tokens"] == len(text) - 1  # nothing precedes the first one
        assert line["mean"] == pytest.approx(mean, rel=1e-4)
        assert line["logprob"] == pytest.approx(mean * (len(text) - 1), rel=1e-4)
        assert line["perplexity"] == pytest.approx(math.exp(-mean), rel=1e-4)


@pytest.mark.parametrize("pooling", ["mean", "last", "null"])
def test_embeddings_are_pooled_states_of_transformers(folder, theirs, command, pooling):
    [line] = lines(command, "prompt=hello", "embed=true", f"pooling={pooling}")
    with torch.no_grad():
        states = theirs.transformer(torch.tensor([[*b"hello", 256]])).last_hidden_state[0]
    expected = states.mean(0) if pooling == "mean" else states[-1]
    torch.testing.assert_close(torch.tensor(line["embedding"]), expected / expected.norm(), atol=1e-5, rtol=1e-4)


def test_a_reward_model_gives_its_score(small_model, byte_tokenizer, capfd):
    model = small_model()
    model.set_head(Head.score)
    torch.nn.init.normal_(model.score.weight)
    print_scores(Loaded(model, byte_tokenizer, Path("somewhere")), ["good", "not so good"])
    rows = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    for line, text in zip(rows, ("good", "not so good"), strict=True):
        with torch.no_grad():
            last = model.features(torch.tensor([[*text.encode(), 256]]))[0, -1]
        assert line == {"prompt": text, "score": pytest.approx((model.score.weight[0] @ last).item(), rel=1e-4)}


@pytest.mark.parametrize("option", ["generation.prompt_lookup=2", "generation.draft=model"])
def test_speculation_changes_no_word_and_says_what_it_gained(folder, command, option):
    options = ("checkpoint=model", "prompt=abcab", "generation=greedy", "generation.max_new_tokens=30")
    plain, fast = command("generate", *options), command("generate", *options, option)
    assert fast.out == plain.out
    assert fast.err.startswith("speculation: ")
    if "draft" in option:
        assert fast.err.startswith("speculation: 100% of ")


def test_options_that_are_text_need_no_quotes(folder, command):
    pytest.importorskip("llguidance")
    options = ("checkpoint=model", "prompt=x", "generation.max_new_tokens=20")
    assert command("generate", *options, "generation.regex=(yes|no)[0-9]{1}").out[1:-2] in ("yes", "no")
    schema = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"], "additionalProperties": False}
    schema["x-guidance"] = {"whitespace_flexible": False}
    result = command("generate", *options, f"generation.json_schema={json.dumps(schema)}")
    assert json.loads(result.out[1:]) == {"a": 1}


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("embed=true score=true", "choose one"),
        ("pooling=most embed=true", "pooling=most is not one of"),
        ("top_k=0", "top_k=0 must be at least 1"),
        ("generation.draft=nowhere", "nowhere"),
        ("generation.num_beams=2", "generation.temperature=0"),
    ],
)
def test_a_mistake_is_one_line(folder, command, mistake, message):
    result = command("generate", "checkpoint=model", "prompt=x", *mistake.split())
    assert result.status in (1, 2)
    assert result.err.count("\n") == 1
    assert message in result.err


def test_a_draft_of_another_tokenizer_is_refused(folder, command, byte_level_tokenizer, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for path in folder.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    byte_level_tokenizer(eos_token="<end>").save_pretrained(other)
    result = command("generate", "checkpoint=model", "prompt=x", "generation.draft=other")
    assert result.err == ("error: generation.draft=other: its tokenizer is another one than that of the checkpoint\n")
