"""Scores of steps: rows longer than the model reads lose the beginning of the prompt, longer answers are read in windows."""

import pytest
import torch

from genai_pl.config.enums import Head
from genai_pl.data import byte_tokenizer
from genai_pl.evaluation.steps import step_scores
from genai_pl.models import Model, ModelConfig, build_model

TOKENIZER = byte_tokenizer()
LIMIT = 16


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(0)
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "max_seq_len": LIMIT, "vocab_size": len(TOKENIZER)}
    return build_model(ModelConfig(**sizes, head=Head.tokens, n_labels=2)).eval()


def scores(model: Model, prompt: str, steps: list[str]) -> list[float]:
    return step_scores(model, TOKENIZER, [prompt], [steps], separator="\n", max_length=LIMIT)[0]


def probability(model: Model, text: str) -> float:
    """That of the step at whose end a text of at most LIMIT bytes stops."""
    ids = torch.tensor([TOKENIZER.encode(text, add_special_tokens=False)])
    assert ids.shape[1] <= LIMIT
    return model.label_logits(model.features(ids))[0, -1].softmax(-1)[1].item()


def test_a_long_prompt_loses_its_beginning(model: Model) -> None:
    found = scores(model, "the beginning is lost: ", ["ab", "cde"])
    expected = [probability(model, text) for text in ("is lost: ab\n", "is lost: ab\ncde\n")]
    assert found == pytest.approx(expected, abs=1e-6)


def test_steps_beyond_the_context_are_read_in_windows(model: Model) -> None:
    steps = ["abc", "defgh", "ijklm", "nop", "qrstu", "a step that is longer than what the model reads", "v"]
    text = "prompt: " + "".join(f"{step}\n" for step in steps)
    ends = [12, 18, 24, 28, 34, 82, 84]
    starts = [0, 10, 10, 20, 20, 74, 74]  # half a window before the first step that the window before has not read
    expected = [probability(model, text[start:end]) for start, end in zip(starts, ends, strict=True)]
    assert scores(model, "a long prompt: ", steps) == pytest.approx(expected, abs=1e-6)
