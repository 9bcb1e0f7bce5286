"""Supervised fine-tuning: what is learned of completions and conversations, and what of it transformers would compute."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from genai_pl.data import byte_tokenizer, special_tokens
from genai_pl.data.chat import ChatDataModule
from genai_pl.data.prompt_tokens import (
    TEMPLATE,
    encode_answers,
    encode_completion,
    encode_completions,
    encode_conversations,
    encode_messages,
    encode_prompt,
    ensure_template,
)
from genai_pl.errors import DataError
from genai_pl.objectives import SFTCollator
from tests.conftest import TINY

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "And three?"},
    {"role": "assistant", "content": "3, naïf"},
]
# an answer opens otherwise than the prompt asks for it, and system messages move: as some templates have it
ODD = (
    "{% for m in messages %}{{ '[' + m['role'] + '] ' + m['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)


def learned(example, tokenizer) -> str:
    return tokenizer.decode(example.input_ids[example.loss_mask])


def test_only_what_assistants_say_is_learned_their_end_marker_included() -> None:
    tokenizer = byte_tokenizer()
    ensure_template(tokenizer)
    assert tokenizer.chat_template == TEMPLATE
    example = encode_messages(tokenizer, TALK)
    assert tokenizer.decode(example.input_ids) == tokenizer.apply_chat_template(TALK, tokenize=False)
    assert learned(example, tokenizer) == "2<|im_end|>\n3, naïf<|im_end|>\n"


def test_another_template_is_followed() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = ODD
    assert learned(encode_messages(tokenizer, TALK), tokenizer) == " 2\n 3, naïf\n"


def test_a_prompt_is_what_stands_before_the_answer_in_training() -> None:
    tokenizer = byte_tokenizer()
    ensure_template(tokenizer)
    example = encode_messages(tokenizer, TALK[:3])
    n_given = int(example.loss_mask.argmax())
    assert np.array_equal(encode_prompt(tokenizer, TALK[:2]), example.input_ids[:n_given])
    example = encode_completion(tokenizer, "1 + 1 = ", "2")
    assert np.array_equal(encode_prompt(tokenizer, "1 + 1 = "), example.input_ids[: int(example.loss_mask.argmax())])


def test_a_completion_is_learned_with_its_end() -> None:
    tokenizer = byte_tokenizer()
    example = encode_completion(tokenizer, "ab", "cd")
    assert example.input_ids.tolist() == [*b"abcd", tokenizer.eos_token_id]
    assert example.loss_mask.tolist() == [False, False, True, True, True]
    tokenizer = tokenizer_with_template()
    by_messages = encode_completion(tokenizer, [{"role": "user", "content": "x"}], "y")
    assert learned(by_messages, tokenizer) == "y<|im_end|>\n"


def test_only_the_last_answer_is_a_completion_of_a_conversation() -> None:
    tokenizer = tokenizer_with_template()
    for example in encode_completions(tokenizer, [TALK[:2], TALK[:4]], ["2", [TALK[4]]]):
        assert learned(example, tokenizer) in ("2<|im_end|>\n", "3, naïf<|im_end|>\n")
    ((prompt, (answer,)),) = encode_answers(tokenizer, [TALK[:4]], [["3, naïf"]])
    assert np.array_equal(prompt, encode_prompt(tokenizer, TALK[:4]))
    assert tokenizer.decode(answer) == "3, naïf<|im_end|>\n"


def test_batches_are_tokenized_as_their_texts_are_alone() -> None:
    tokenizer = tokenizer_with_template()
    talks = [TALK, TALK[1:3], TALK[:2]]
    for talk, example in zip(talks, encode_conversations(tokenizer, talks, [0, 0, 0]), strict=True):
        text = tokenizer.apply_chat_template(talk, tokenize=False)
        assert example.input_ids.tolist() == tokenizer(text)["input_ids"]
        assert len(example.loss_mask) == len(example.input_ids)
    prompts, completions = ["", "ab", "naïf"], ["c", "", "de"]
    for n, example in enumerate(encode_completions(tokenizer, prompts, completions)):
        assert example.input_ids.tolist() == [*(prompts[n] + completions[n]).encode(), tokenizer.eos_token_id]
        assert example.loss_mask.sum() == len(completions[n]) + 1


def test_tokens_are_kept_for_the_same_rows_tokenizer_and_template(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "talk.jsonl", [{"messages": TALK[: 3 + 2 * (n % 2)]} for n in range(30)])

    def rows(template: str) -> list[list[int]]:
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = template
        data = ChatDataModule(
            path=str(tmp_path / "talk.jsonl"), val_path=None, val_fraction=0.2, messages="messages", prompt="prompt",
            completion="completion", packing=False, seq_len=400, batch_size=2, val_batch_size=None, workers=0,
            shuffle=True, seed=0,
        )  # fmt: skip
        data.prepare(tokenizer, SFTCollator(vocabulary=special_tokens(tokenizer, len(tokenizer))))
        return [row["input_ids"].tolist() for row in [*data.train_rows, *data.val_rows]]

    first, odd = rows(TEMPLATE), rows(ODD)
    assert len(first) == 30
    assert first != odd

    def asked_again(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr("genai_pl.data.chat.encode_conversations", asked_again)
    assert (rows(TEMPLATE), rows(ODD)) == (first, odd)
    with pytest.raises(AssertionError):
        rows(ODD + " ")


def tokenizer_with_template():
    tokenizer = byte_tokenizer()
    ensure_template(tokenizer)
    return tokenizer


@pytest.mark.parametrize("broken", [[{"role": "user"}], ["text"], [{"content": "x"}]])
def test_a_message_without_role_or_content_is_an_error(broken: list) -> None:
    with pytest.raises(DataError, match="each is an object with role and content"):
        encode_messages(tokenizer_with_template(), broken)


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


SUMS = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(8) for b in range(8)]


@pytest.mark.parametrize("packing", ["true", "false"])
def test_the_loss_is_that_of_transformers_on_the_same_rows(packing: str, command, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    write(tmp_path / "train.jsonl", SUMS)
    write(tmp_path / "val.jsonl", SUMS[5:40])
    result = command(
        "train", "objective=sft", *TINY, "data.path=train.jsonl", "data.val_path=val.jsonl", f"data.packing={packing}",
        "trainer.limit_val_batches=1.0", "hydra.run.dir=run",
    )  # fmt: skip
    assert result.status == 0, result.err
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run/model")
    total, count = 0.0, 0
    for row in SUMS[5:40]:
        prompt_ids = tokenizer(row["prompt"])["input_ids"]
        ids = prompt_ids + tokenizer(row["completion"])["input_ids"] + [tokenizer.eos_token_id]
        labels = torch.tensor([[-100] * len(prompt_ids) + ids[len(prompt_ids) :]])
        n = int((labels != -100).sum())
        with torch.no_grad():
            total += model(torch.tensor([ids]), labels=labels).loss.item() * n
        count += n
    printed_loss = float(result.out.split("val/loss ")[-1].split()[0])
    assert printed_loss == pytest.approx(total / count, abs=2e-4)


def test_conversations_train_and_their_template_is_saved(command, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    write(tmp_path / "talk.jsonl", [{"messages": TALK}, {"messages": TALK[1:3]}] * 6)
    result = command(
        "train", "objective=sft", *TINY, "model.max_seq_len=160", "data.path=talk.jsonl", "hydra.run.dir=run"
    )
    assert result.status == 0, result.err
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run/model")
    assert tokenizer.chat_template == TEMPLATE


def test_examples_with_nothing_to_learn_are_counted_and_all_of_them_an_error(command, tmp_path: Path) -> None:
    long = {"prompt": "x" * 100, "completion": "y"}
    write(tmp_path / "some.jsonl", [*SUMS, long, long])
    result = command("train", "objective=sft", *TINY, "data.path=some.jsonl")
    assert result.status == 0
    assert "examples have nothing to learn: left out" in result.out + result.err
    write(tmp_path / "none.jsonl", [long] * 8)
    result = command("train", "objective=sft", *TINY, "data.path=none.jsonl")
    assert result.status == 1
    assert "no training example has anything to learn" in result.err


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question": "a", "answer": "b"}] * 4, "no column 'prompt'; found: question, answer (set data.prompt)"),
        ([{"messages": [{"role": "user"}]}] * 4, "each is an object with role and content"),
    ],
)
def test_bad_examples_are_one_line(rows: list, message: str, command, tmp_path: Path) -> None:
    write(tmp_path / "bad.jsonl", rows)
    result = command("train", "objective=sft", *TINY, "data.path=bad.jsonl")
    assert result.status == 1
    assert message in result.err
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1


def test_a_template_that_asks_otherwise_than_it_teaches_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "talk.jsonl", [{"messages": TALK[1:3]}] * 4)
    options = {"val_path": None, "val_fraction": 0.5, "packing": False, "seq_len": 400, "batch_size": 2}
    for asks, is_said in (("[assistant]", False), ("[assistant]<think>", True)):  # as DeepSeek R1's does
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = ODD.replace("'[assistant]'", f"'{asks}'")
        data = ChatDataModule(
            path=str(tmp_path / "talk.jsonl"), messages="messages", prompt="prompt", completion="completion",
            val_batch_size=None, workers=0, shuffle=True, seed=0, **options,
        )  # fmt: skip
        data.prepare(tokenizer, SFTCollator(vocabulary=special_tokens(tokenizer, 258)))
        assert ("the chat template asks with" in caplog.text) is is_said
