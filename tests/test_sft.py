"""Supervised fine-tuning: what is learned of completions and conversations, and what of it transformers would compute."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from genai_pl.data import byte_tokenizer
from genai_pl.data.chat import TEMPLATE, encode_completion, encode_messages, encode_prompt, ensure_template
from genai_pl.errors import DataError
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
    by_messages = encode_completion(tokenizer_with_template(), [{"role": "user", "content": "x"}], "y")
    assert learned(by_messages, tokenizer) == "y<|im_end|>\n"


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
        given = tokenizer(row["prompt"])["input_ids"]
        ids = given + tokenizer(row["completion"])["input_ids"] + [tokenizer.eos_token_id]
        labels = torch.tensor([[-100] * len(given) + ids[len(given) :]])
        n = int((labels != -100).sum())
        with torch.no_grad():
            total += model(torch.tensor([ids]), labels=labels).loss.item() * n
        count += n
    said = float(result.out.split("val/loss ")[-1].split()[0])
    assert said == pytest.approx(total / count, abs=2e-4)


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
