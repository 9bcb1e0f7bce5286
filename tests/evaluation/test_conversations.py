"""evaluate.py on conversations: the loss of what assistants say, as transformers computes it with marks in the template."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from genai_pl.evaluation import Kind, read_examples
from genai_pl.evaluation.preferences import reward_tokens
from genai_pl.loading import load
from tests.serving.servers import write_model

# ChatML with the marks by which transformers tells what assistants say, its line break included as in TRL's
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>\\n' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
)
TALK = [
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "Three?"},
    {"role": "assistant", "content": "3, naïf"},
]


@pytest.mark.parametrize("kind", ["messages", "completions"])
def test_the_loss_of_answers_is_that_of_transformers(kind: str, command, tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    talks = [TALK, TALK[:2]]
    rows = [{"messages": talk} for talk in talks]
    if kind == "completions":
        rows = [{"prompt": talk[:-1], "completion": talk[-1]["content"]} for talk in talks]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = command("evaluate", "checkpoint=model", "data.path=talks.jsonl", "out=figures.json")
    assert result.status == 0, result.err
    found = json.loads((tmp_path / "figures.json").read_text())

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    losses = []
    for talk in talks:
        encoded = tokenizer.apply_chat_template(
            talk, chat_template=MARKED, return_dict=True, return_assistant_tokens_mask=True
        )
        mask = torch.tensor(encoded["assistant_masks"], dtype=torch.bool)
        if kind == "completions":  # the last answer alone
            mask[: len(mask) - len(tokenizer(talk[-1]["content"] + "<|im_end|>\n")["input_ids"])] = False
        ids = torch.tensor(encoded["input_ids"])[None]
        with torch.no_grad():
            logprobs = model(ids).logits[0, :-1].log_softmax(-1)
        losses += (-logprobs.gather(1, ids[0, 1:, None])[:, 0][mask[1:]]).tolist()
    assert found["tokens"] == len(losses)
    assert found["loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-5)


def test_a_conversation_without_a_template_is_refused(command, tmp_path: Path) -> None:
    write_model(tmp_path / "model", template=False)
    (tmp_path / "talks.jsonl").write_text(json.dumps({"messages": TALK}) + "\n")
    result = command("evaluate", "checkpoint=model", "data.path=talks.jsonl")
    assert result.status == 1
    assert result.err.splitlines()[-1].startswith("error: ")
    assert "no chat template" in result.err


def test_pairs_are_compared_with_the_tools_that_were_offered(command, tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    template = "{% if tools %}{{ tools | tojson }}{% endif %}" + MARKED.replace("{% generation %}", "").replace(
        "{% endgeneration %}", ""
    )
    (tmp_path / "model" / "chat_template.jinja").write_text(
        template + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    tool = {"type": "function", "function": {"name": "clock"}}
    row = {"prompt": TALK[:1], "chosen": "2", "rejected": "3", "tools": [tool]}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    kind, columns = read_examples(str(tmp_path / "pairs.jsonl"))
    assert kind is Kind.preferences
    assert columns[3] == [[tool]]
    tokenizer = load(str(tmp_path / "model")).tokenizer
    (judged,) = reward_tokens(tokenizer, columns[0], columns[1], columns[3])
    whole = [*TALK[:1], {"role": "assistant", "content": "2"}]
    assert judged.tolist() == tokenizer.apply_chat_template(whole, tools=[tool], return_dict=True)["input_ids"]
    assert command("evaluate", "checkpoint=model", "data.path=pairs.jsonl").status == 0
