from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")

from peft import PrefixTuningConfig
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
from genai_pl.peft import prefix
from genai_pl.peft.io.tensors import AdapterFile
from genai_pl.peft.prefix import read_prefix, write_prefix

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*")
KINDS = ["gpt2", "llama", "qwen3", "gemma3", "bert", "t5", "t5_three_layers", "olmo2"]


@pytest.mark.parametrize("hidden_size", [None, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_peft_reads_our_prefix_and_says_the_same(kind: str, hidden_size: int | None, tmp_path: Path):
    theirs, ours = both(kind, tmp_path)
    ours = shaken(prefix(ours, n_tokens=3, hidden_size=hidden_size), of="trained", std=0.5)
    theirs = read_by_ours(theirs, ours, write_prefix, tmp_path / "adapter")
    assert_same(logits(ours), their_logits(kind, theirs, tokens()))


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_we_read_a_prefix_of_pefts_and_say_the_same(kind: str, projection: bool, tmp_path: Path):
    theirs, ours = both(kind, tmp_path)
    options = {"prefix_projection": projection, "encoder_hidden_size": 8}
    config = PrefixTuningConfig(task_type=TASKS.get(kind, "CAUSAL_LM"), num_virtual_tokens=3, **options)
    theirs, contents = made_by_peft(theirs, config, tmp_path / "adapter")
    ours = read_prefix(ours, contents)
    assert_same(logits(ours), their_logits(kind, theirs, tokens()))
    if kind not in TASKS:
        assert_padded_rows_are_the_same(kind, ours, theirs, tokens())


def test_a_file_written_by_us_is_read_by_us():
    for kind in ("gpt2", "t5", "bert"):
        model = shaken(prefix(build(kind), n_tokens=3, hidden_size=8), of="trained")
        again = read_prefix(
            build(kind), write_prefix(model, model.decoder.virtual.adapter if kind == "t5" else model.virtual.adapter)
        )
        torch.testing.assert_close(logits(again), logits(model))


def test_a_prefix_begins_as_small_numbers():
    model = prefix(build_model(ModelConfig(**SHAPES["gpt2"])), n_tokens=20)
    assert model.virtual.layers().std().item() == pytest.approx(0.02, rel=0.1)
    assert model.virtual.layers().shape == (2, 2, 4, 20, 8)


def test_a_prefix_is_seen_from_beyond_a_window():
    model = prefix(shaken(build_model(ModelConfig(**{**SHAPES["llama"], "n_layer": 1, "window": 3}))), n_tokens=3)
    model = shaken(model, of="trained", std=0.5)
    before = model(tokens())
    model.virtual.weight.data[0] += 1.0
    assert (model(tokens()) - before).abs().amax(-1).min() > 1e-4


def test_options_that_cannot_be_are_one_line():
    with pytest.raises(ConfigError, match="must be above 0, or null, not 0"):
        prefix(build("gpt2"), n_tokens=3, hidden_size=0)


@pytest.mark.parametrize(
    ("kind", "width", "message"), [("gpt2", 100, "this model asks for"), ("t5", 64, "of 2 layers")]
)
def test_a_file_that_does_not_fit_is_one_line(kind: str, width: int, message: str):
    contents = AdapterFile({"num_virtual_tokens": 3}, {"prompt_embeddings": torch.zeros(3, width)})
    with pytest.raises(CheckpointError, match=message):
        read_prefix(build(kind), contents)
