from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")

from peft import PromptTuningConfig
from peft_models import SHAPES, build, logits, shaken, tokens
from virtual_files import (
    TASKS,
    assert_padded_rows_are_the_same,
    assert_same,
    both,
    made_by_peft,
    read_by_ours,
    their_logits,
)

from genai_pl.errors import CheckpointError, ConfigError
from genai_pl.models import ModelConfig, build_model
from genai_pl.peft import prompt
from genai_pl.peft.io.tensors import AdapterFile
from genai_pl.peft.prompt import read_prompt, write_prompt

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*")
KINDS = ["gpt2", "llama", "qwen3", "gemma3", "bert", "t5", "olmo2"]


@pytest.mark.parametrize("kind", KINDS)
def test_peft_reads_our_prompt_and_says_the_same(kind: str, tmp_path: Path):
    theirs, ours = both(kind, tmp_path)
    ours = shaken(prompt(ours, n_tokens=3), of="trained", std=0.5)
    theirs = read_by_ours(theirs, ours, write_prompt, tmp_path / "adapter")
    assert_same(logits(ours), their_logits(kind, theirs, tokens()))


@pytest.mark.parametrize("kind", KINDS)
def test_we_read_a_prompt_of_pefts_and_say_the_same(kind: str, tmp_path: Path):
    theirs, ours = both(kind, tmp_path)
    config = PromptTuningConfig(task_type=TASKS.get(kind, "CAUSAL_LM"), num_virtual_tokens=3)
    theirs, contents = made_by_peft(theirs, config, tmp_path / "adapter")
    ours = read_prompt(ours, contents)
    assert_same(logits(ours), their_logits(kind, theirs, tokens()))
    if kind not in TASKS:
        assert_padded_rows_are_the_same(kind, ours, theirs, tokens())


def test_a_prompt_may_begin_as_words_as_drawn_words_or_as_numbers():
    model = build("gpt2")
    table = model.embed.weight
    assert torch.equal(
        prompt(build("gpt2"), n_tokens=5, init="text", init_text="a b", init_ids=[7, 9]).virtual.weight,
        table[[7, 9, 7, 9, 7]],
    )
    assert torch.equal(
        prompt(build("gpt2"), n_tokens=1, init="text", init_text="a b", init_ids=[7, 9]).virtual.weight, table[[7]]
    )
    drawn = prompt(build("gpt2"), n_tokens=5, init="vocabulary").virtual.weight
    assert all((row == table).all(1).any() for row in drawn)
    numbers = prompt(build_model(ModelConfig(**SHAPES["gpt2"])), n_tokens=23).virtual.weight
    assert numbers.std().item() == pytest.approx(0.02, rel=0.2)


def test_a_prompt_of_words_is_the_words():
    values = {**SHAPES["llama"], "scale_embeddings": True}
    model, ids = shaken(build_model(ModelConfig(**values))), tokens()
    expected = model(torch.cat([torch.tensor([[5, 8, 6]] * 2), ids], dim=1))[:, 3:]
    model = prompt(model, n_tokens=3, init="text", init_text="x", init_ids=[5, 8, 6])
    torch.testing.assert_close(model(ids), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init": "words"}, "peft.init=words is not one of random, text, vocabulary"),
        ({"init": "text"}, "peft.init=text and peft.init_text=None do not fit: set peft.init_text"),
        ({"init_text": "a", "init_ids": [1]}, "do not fit: set peft.init=text, or peft.init_text=null"),
    ],
)
def test_options_that_do_not_fit_are_one_line(options: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        prompt(build("gpt2"), n_tokens=3, **options)


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ({"num_virtual_tokens": 3}, {}, "a tensor prompt_embeddings and no other, not none"),
        ({"num_virtual_tokens": 9}, {"prompt_embeddings": torch.zeros(3, 32)}, "does not fit num_virtual_tokens=9"),
        ({}, {"prompt_embeddings": torch.zeros(3, 32)}, "does not fit num_virtual_tokens=None"),
        (
            {"num_virtual_tokens": 3},
            {"prompt_embeddings": torch.zeros(3, 48)},
            r"has shape \[3, 48\], this model asks for \[3, 32\]",
        ),
    ],
)
def test_a_file_that_does_not_fit_is_one_line(config: dict, tensors: dict, message: str):
    with pytest.raises(CheckpointError, match=message):
        read_prompt(build("gpt2"), AdapterFile(config, tensors))
