"""The loss and counts of steps against transformers' token classification, and rows as TRL's PRMTrainer tokenized them."""

from itertools import chain

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForTokenClassification

from genai_pl.data import byte_tokenizer
from genai_pl.data.steps import encode_steps, split_steps
from genai_pl.objectives import IGNORED, SpecialTokens, StepCollator, process_reward_loss


def test_the_loss_is_that_of_transformers() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = LlamaForTokenClassification(LlamaConfig(**sizes, vocab_size=32, num_labels=2)).double().eval()
    ids = torch.randint(32, (2, 9))
    labels = torch.full((2, 9), IGNORED)
    labels[0, 3], labels[0, 8], labels[1, 5] = 1, 0, 1
    theirs = model(input_ids=ids, labels=labels)
    chosen = labels != IGNORED
    ours = process_reward_loss(theirs.logits[chosen], labels[chosen].double())
    assert ours.item() / 3 == pytest.approx(theirs.loss.item(), abs=1e-6)  # theirs is in float32


def test_soft_labels_are_weights_of_both_classes() -> None:
    logits, labels = np.array([[0.3, -0.2], [1.0, 2.5]]), np.array([0.25, 0.8])
    reward = 1 / (1 + np.exp(logits[:, 0] - logits[:, 1]))
    expected = -(labels * np.log(reward) + (1 - labels) * np.log(1 - reward)).sum()
    assert process_reward_loss(torch.tensor(logits), torch.tensor(labels)).item() == pytest.approx(expected, abs=1e-12)


def test_a_step_ends_at_the_last_token_of_its_separator() -> None:
    tokenizer = byte_tokenizer()
    ((prompt, steps, ends),) = encode_steps(tokenizer, ["ab"], [["c", "de"]], "\n\n")
    # TRL 0.24's rows: prompt, then each completion and the separator, tokenized without special tokens
    parts = [tokenizer.encode(text, add_special_tokens=False) for text in ("c", "\n\n", "de", "\n\n")]
    assert (prompt.tolist(), steps.tolist()) == (tokenizer.encode("ab"), [*chain(*parts)])
    assert ends.tolist() == [len(parts[0] + parts[1]), len(steps)]


def test_batches_have_labels_where_steps_end() -> None:
    rows = [
        {"input_ids": np.array([5, 6, 7]), "labels": np.array([IGNORED, 0.5, 1], dtype=np.float32)},
        {"input_ids": np.array([8]), "labels": np.array([0], dtype=np.float32)},
    ]
    batch = StepCollator(vocabulary=SpecialTokens(size=9, pad=0))(rows)
    assert batch["labels"].tolist() == [[IGNORED, 0.5, 1], [0, IGNORED, IGNORED]]
    assert (batch["targets"].item(), batch["segment_ids"].tolist()) == (3, [[1, 1, 1], [1, 0, 0]])


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a|b", [("a", 2), ("b", 3)]), ("||a| |", [("a", 6)]), (" ", [(" ", 1)]), ("a|b|", [("a", 2), ("b", 4)])],
)
def test_blank_steps_are_none(text: str, expected: list) -> None:
    assert split_steps(text, "|") == expected
