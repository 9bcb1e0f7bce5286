"""A small model that is evaluated, by us and by transformers."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from genai_pl.data import byte_tokenizer
from tests.evaluation.reference_loop import CONTEXT


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 of random weights over bytes whose most likely token is always a small letter."""
    path = tmp_path_factory.mktemp("evaluate") / "model"
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT, "vocab_size": 258}
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **sizes, tie_word_embeddings=False))
    generator = torch.Generator().manual_seed(0)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    with torch.no_grad():
        theirs.lm_head.weight[: ord("a")] = 0
        theirs.lm_head.weight[ord("z") + 1 :] = 0
    theirs.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def theirs(folder: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder).eval()
