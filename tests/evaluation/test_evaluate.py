"""`python evaluate.py`: the figures of a plain loop over transformers' model, however rows are batched and padded."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from transformers import AutoConfig, AutoModelForMaskedLM

from genai_pl.cli.command import CONF, register
from genai_pl.data import byte_tokenizer, train_bpe
from genai_pl.data.sources import CORPUS
from genai_pl.evaluation import completion_windows, score, text_windows
from genai_pl.evaluation.windows import windows
from genai_pl.loading import load
from tests.evaluation.reference_loop import CONTEXT, greedy_text, reference_nll, write_lines

TEXTS = ["Two households, both alike in dignity, in fair Verona", "short", "x", ""]
PROMPTS = ["Where is the", "ends in spaces  ", "longer than the context of the model is, so it is cut", ""]


@pytest.mark.parametrize("n_tokens", [0, 1, 2, 5, 6, 7, 10, 11, 12, 40])
@pytest.mark.parametrize("stride", [1, 2, 3, 5])
def test_windows_score_each_token_but_the_first_once_with_the_context_that_the_stride_promises(
    n_tokens: int, stride: int
) -> None:
    tokens, scored = np.arange(n_tokens), []
    for row in windows(tokens, seq_len=5, stride=stride):
        assert len(row.tokens) <= 6
        assert row.n_scored >= 1
        assert row.n_context >= min(int(row.tokens[row.n_context]), 6 - stride)
        scored += row.tokens[row.n_context :].tolist()
    assert scored == list(range(1, n_tokens))


@pytest.mark.parametrize(("rounded", "error"), [("int8", 2e-2), ("int4", 0.1)])
def test_codes_give_nearly_the_figures_of_float32(
    rounded: str, error: float, folder: Path, command, tmp_path: Path
) -> None:
    data, found = write_lines(tmp_path / "texts.jsonl", [{"text": text} for text in TEXTS]), []
    for dtype in ("null", rounded):
        result = command("evaluate", f"checkpoint={folder}", f"data.path={data}", f"dtype={dtype}", f"out={dtype}.json")
        assert (result.status, result.err) == (0, "")
        found.append(json.loads((tmp_path / f"{dtype}.json").read_text()))
    assert found[0]["perplexity"] != found[1]["perplexity"]
    assert found[0]["perplexity"] == pytest.approx(found[1]["perplexity"], rel=error)


def test_a_text_gets_the_figures_of_transformers_window_by_window(
    folder: Path, theirs, command, tmp_path: Path
) -> None:
    data = write_lines(tmp_path / "texts.jsonl", [{"body": text, "other": 1} for text in TEXTS])
    arguments = ("evaluate", f"checkpoint={folder}", f"data.path={data}", "data.column=body", "data.stride=7")
    result = command(*arguments, "data.seq_len=10", "out=figures/all.json")
    assert result.status == 0, result.err
    assert result.err == ""
    total, hits = 0.0, []
    for ids in (list(text.encode()) for text in TEXTS):
        for n, token in list(enumerate(ids))[1:]:
            window = max(0, -(-(n - 10) // 7))  # the first one that reaches as far as token n
            nll, hit = reference_nll(theirs, ids[7 * window : n], [token])
            total, hits = total + nll, hits + hit
    figures = json.loads((tmp_path / "figures" / "all.json").read_text())
    assert (figures["rows"], figures["tokens"], figures["cut"]) == (4, len(hits), 0)
    loss = total / len(hits)
    assert figures["loss"] == pytest.approx(loss, rel=1e-5)
    assert figures["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert figures["bpb"] == pytest.approx(loss / math.log(2), rel=1e-5)  # a token is a byte
    assert figures["token_accuracy"] == sum(hits) / len(hits)
    assert "accuracy" not in figures
    assert figures["config"]["data"]["stride"] == 7
    printed = dict(line.split(maxsplit=1) for line in result.out.splitlines())
    assert float(printed["loss"]) == pytest.approx(loss, abs=1e-4)
    assert printed["n"] == f"4 rows, {len(hits)} tokens"


def test_completions_get_the_figures_of_transformers_one_by_one(folder: Path, theirs, command, tmp_path: Path) -> None:
    completions = [greedy_text(theirs, PROMPTS[0], 3), "word", greedy_text(theirs, PROMPTS[2], 2), "ab"]
    rows = [{"prompt": p, "completion": c} for p, c in zip(PROMPTS, completions, strict=True)]
    path = write_lines(tmp_path / "pairs.jsonl", rows)
    result = command("evaluate", f"checkpoint={folder}", f"data.path={path}", "batch_tokens=40", "out=figures.json")
    assert result.status == 0, result.err
    scored = [reference_nll(theirs, list(b"Where is the"), list(completions[0].encode()))]
    scored += [reference_nll(theirs, list(b"ends in spaces"), list(b"  word"))]
    scored += [reference_nll(theirs, list(PROMPTS[2].encode())[-(CONTEXT - 1) :], list(completions[2].encode()))]
    scored += [reference_nll(theirs, [byte_tokenizer().bos_token_id], list(completions[3].encode()))]
    nlls, hits = [nll for nll, _ in scored], [hit for _, row in scored for hit in row]
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["loss"] == pytest.approx(sum(nlls) / len(hits), rel=1e-5)
    assert figures["perplexity"] == pytest.approx(math.exp(sum(nlls) / len(hits)), rel=1e-5)
    assert figures["completion_perplexity"] == pytest.approx(math.exp(sum(nlls) / 4), rel=1e-4)
    assert figures["accuracy"] == sum(all(row) for _, row in scored) / 4
    assert figures["accuracy"] > 0
    assert figures["token_accuracy"] == sum(hits) / len(hits)
    assert (figures["rows"], figures["tokens"], figures["cut"]) == (4, len(hits), 1)
    assert f"1 prompts, on the left, to the context of {CONTEXT} tokens" in result.out


def test_batches_padding_and_chunks_of_logits_change_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = load(str(folder))
    pairs = [prompt or "a" for prompt in PROMPTS], [" b", " longer", " c d", " e"]
    rows = completion_windows(*pairs, ours.tokenizer, seq_len=CONTEXT) + text_windows(
        TEXTS, ours.tokenizer, seq_len=CONTEXT
    )
    seen: list[int] = []
    alone = score(ours.model, rows, batch_tokens=1, on_batch=seen.append)
    assert seen == [1] * len(rows)
    together = score(ours.model, rows, batch_tokens=100, on_batch=seen.append)
    assert max(seen) > 1
    monkeypatch.setattr("genai_pl.kernels.chunked_logits.CHUNK_BYTES", 4 * 258 * 3)  # three tokens
    for found in (together, score(ours.model, rows, batch_tokens=100)):
        torch.testing.assert_close(found.nll, alone.nll, rtol=1e-5, atol=1e-5)
        assert torch.equal(found.hits, alone.hits)
        assert found.correct.sum() == alone.correct.sum() == alone.hits.sum()
        torch.testing.assert_close(found.confidence.sort()[0], alone.confidence.sort()[0], rtol=1e-5, atol=1e-5)


def test_the_first_token_is_scored_only_after_a_bos() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_tokenizer()
    bos = tokenizer.bos_token_id
    (plainly,) = text_windows(["abc"], tokenizer, seq_len=8)
    (asked,) = text_windows(["abc"], tokenizer, seq_len=8, bos=True)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", bos)]
    )
    (by_itself,) = text_windows(["abc"], tokenizer, seq_len=8)
    (refused,) = text_windows(["abc"], tokenizer, seq_len=8, bos=False)
    for row in (plainly, refused):
        assert (row.tokens.tolist(), row.n_context) == ([97, 98, 99], 1)
    for row in (asked, by_itself):
        assert (row.tokens.tolist(), row.n_context) == ([bos, 97, 98, 99], 1)
    (pair,) = completion_windows(["ab"], ["c"], tokenizer, seq_len=8)
    assert (pair.tokens.tolist(), pair.n_context) == ([bos, 97, 98, 99], 3)


def test_a_prompt_and_its_completion_are_encoded_together_and_the_space_between_them_is_the_completions() -> None:
    tokenizer = train_bpe(["the sign the signs the sign" * 10], 300)
    whole, prompt = tokenizer.encode("the sign"), tokenizer.encode("the")
    for pair in (("the", " sign"), ("the ", "sign")):
        (row,) = completion_windows([pair[0]], [pair[1]], tokenizer, seq_len=64)
        assert row.tokens.tolist() == whole
        assert row.n_context == len(prompt)


PAIR = {"prompt": "a", "completion": "b"}
MISTAKES = {
    "no column 'text', nor those of another kind of rows; found: body, title": ({"body": "x", "title": "y"}, ()),
    "no column 'nope'; found: prompt, completion": (PAIR, ("data.column=nope",)),
    "row 1: completion is empty": ({**PAIR, "completion": ""}, ()),
    "row 1: column 'prompt': missing (null)": ({**PAIR, "prompt": None}, ()),
    "row 1: completion has 30 tokens, more than the context of 24": ({**PAIR, "completion": "b" * 30}, ()),
    "there is no token to score": ({"text": "x"}, ()),
    "data.stride=25 must lie between 1 and the window, 24 tokens": ({"text": "xy"}, ("data.stride=25",)),
    "data.stride=2: prompts and completions have no windows": (PAIR, ("data.stride=2",)),
    "data.seq_len=90: more than the model's context of 24 tokens": ({"text": "x" * 99}, ("data.seq_len=90",)),
    "limit=0 must be at least 1": (PAIR, ("limit=0",)),
    "out=.: a folder": (PAIR, ("out=.",)),
    "out=data.jsonl/x: cannot be written": (PAIR, ("out=data.jsonl/x",)),
    "precision=fp64: no such option, did you mean fp16?": (PAIR, ("precision=fp64",)),
    "data.strid: no such option, did you mean stride?": (PAIR, ("data.strid=1",)),
}


@pytest.mark.parametrize("said", MISTAKES)
def test_a_mistake_of_evaluate_is_one_line(said: str, folder: Path, command, tmp_path: Path) -> None:
    row, options = MISTAKES[said]
    write_lines(tmp_path / "data.jsonl", [row])
    result = command("evaluate", f"checkpoint={folder}", "data.path=data.jsonl", *options)
    assert result.status in (1, 2)
    assert result.err.count("\n") == 1
    assert result.err.startswith("error: ")
    assert said in result.err


def test_figures_are_written_over_figures_and_over_nothing_else(folder: Path, command, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("so it is")
    (tmp_path / "link.txt").symlink_to("text.txt")
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    given = ("evaluate", f"checkpoint={folder}", "data.path=text.txt")
    for name in before:
        result = command(*given, f"out={name}")
        assert result.err == f"error: out={name}: exists already, and is no table of evaluate.py; name a new file\n"
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    assert command(*given, "out=figures.json").status == 0
    first = (tmp_path / "figures.json").read_text()
    assert command(*given, "out=figures.json", "data.seq_len=4").status == 0
    assert json.loads((tmp_path / "figures.json").read_text())["config"]["data"]["seq_len"] == 4
    assert json.loads(first)["config"]["data"]["seq_len"] is None
    result = command(
        "evaluate", f"checkpoint={folder}", "data.path=figures.json", "data.column=config", "out=figures.json"
    )
    assert result.err.startswith("error: out=figures.json: exists already")


def test_data_that_cannot_be_read_are_one_line(folder: Path, command, tmp_path: Path) -> None:
    (tmp_path / "broken.jsonl").write_bytes(b'{"text": "x"\nnonsense')
    result = command("evaluate", f"checkpoint={folder}", "data.path=broken.jsonl")
    assert result.status == 1
    assert result.err.count("\n") == 1
    assert "broken.jsonl: cannot be read as json" in result.err


def test_a_completion_that_has_no_token_of_its_own_is_encoded_by_itself() -> None:
    tokenizer = train_bpe(["signs signs signs"] * 10, 300)
    assert len(tokenizer("signs")["input_ids"]) == len(tokenizer("sign")["input_ids"])  # it merges with the prompt
    _, row = completion_windows(["x", "sign"], [" y", "s"], tokenizer, seq_len=64)
    before, completion = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("sign", "s"))
    assert row.tokens.tolist()[-len(before + completion) :] == before + completion
    assert row.n_scored == len(completion)


def test_a_model_that_does_not_predict_the_next_token_is_refused(command, tmp_path: Path) -> None:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    bert = AutoConfig.for_model("bert", **sizes, vocab_size=258)
    AutoModelForMaskedLM.from_config(bert).save_pretrained(tmp_path / "bert")
    byte_tokenizer().save_pretrained(tmp_path / "bert")
    write_lines(tmp_path / "data.jsonl", [PAIR])
    result = command("evaluate", "checkpoint=bert", "data.path=data.jsonl")
    assert result.status == 2
    assert result.err == "error: checkpoint=bert: evaluate needs a model of shape decoder, not encoder\n"


def test_of_a_shipped_set_the_validation_part_is_taken(folder: Path, command) -> None:
    options = ("data.path=devil", "data.column=completion", "limit=3", "precision=bf16")
    result = command("evaluate", f"checkpoint={folder}", *options)
    assert result.status == 0, result.err
    rows = [json.loads(line) for line in (CORPUS / "devil" / "val.jsonl").read_text().splitlines()[:3]]
    n_tokens = sum(len(row["completion"].encode()) - 1 for row in rows)
    assert f"3 rows, {n_tokens} tokens" in result.out


@pytest.mark.parametrize("precision", sorted({path.stem for path in CONF.glob("precision/*.yaml")} - {"auto"}))
def test_every_precision_but_that_of_training_is_known(precision: str) -> None:
    from genai_pl.devices import DTYPES

    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        assert compose("evaluate", overrides=[f"precision={precision}"]).precision.lightning in DTYPES


def test_a_window_beyond_the_context_is_refused_of_rotary_positions_too(command, tmp_path: Path) -> None:
    from genai_pl.exporting import export_model
    from genai_pl.models import ModelConfig, build_model

    model = build_model(ModelConfig(n_layer=1, n_head=2, n_embd=32, vocab_size=258, max_seq_len=16))
    export_model(model, byte_tokenizer(), tmp_path / "rotary", card={})
    write_lines(tmp_path / "data.jsonl", [{"text": "x" * 99}])
    result = command("evaluate", "checkpoint=rotary", "data.path=data.jsonl", "data.seq_len=17")
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert "data.seq_len=17: more than the model's context of 16 tokens" in result.err
    assert command("evaluate", "checkpoint=rotary", "data.path=data.jsonl", "data.seq_len=16").status == 0
