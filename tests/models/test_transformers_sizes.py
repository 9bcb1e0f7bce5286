"""Bounds on what a configuration may ask for: a folder with counts beyond its files is refused at once, sizes are no counts."""

import json
from pathlib import Path

import pytest
from one_family import built

from genai_pl.errors import CheckpointError, ConfigError
from genai_pl.models.hf.transformers_model import load_wrapped
from genai_pl.models.hf.transformers_sizes import check_counts


@pytest.mark.parametrize("key", ["num_hidden_layers", "num_local_experts"])
def test_a_folder_of_a_million_million_layers_is_refused_in_a_line(key: str, tmp_path: Path):
    built("mixtral").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: 10**12}))
    with pytest.raises(CheckpointError, match=rf"{key}=1000000000000, and the checkpoint has not their weights"):
        load_wrapped(str(tmp_path))


def test_sizes_and_experts_in_one_tensor_are_no_layers():
    check_counts({"shared_expert_intermediate_size": 5632, "vocab_size_per_layer_input": 262144}, 100)  # as published
    check_counts({"audio_config": {"depthwise_separable_out_channel": 1024}, "num_experts": 16384}, 100)
    with pytest.raises(ConfigError, match="n_layer=1001"):
        check_counts({"text_config": {"n_layer": 1001}}, 100)
