"""Model folders that cannot be read: an error of one line that names the file and the fault."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from genai_pl.errors import CheckpointError
from genai_pl.models import Decoder, ModelConfig, load_pretrained, save_pretrained

LLAMA = ModelConfig(
    n_layer=1,
    n_head=2,
    n_embd=16,
    vocab_size=11,
    max_seq_len=8,
    position="rotary",
    norm="rmsnorm",
    activation="silu",
    gated_mlp=True,
    bias=False,
)
NATIVE = ModelConfig(n_layer=1, n_head=2, n_embd=16, vocab_size=11, max_seq_len=8, position="alibi")
INDEX = "model.safetensors.index.json"


def edit(**values: object) -> Callable[[Path], None]:
    """Change some keys of config.json; ... removes one."""

    def change(folder: Path) -> None:
        file = folder / "config.json"
        old = json.loads(file.read_text())
        file.write_text(json.dumps({k: v for k, v in {**old, **values}.items() if v is not ...}))

    return change


def write(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def shard(weight_map: dict[str, str]) -> Callable[[Path], None]:
    return write(INDEX, json.dumps({"weight_map": weight_map}))


BROKEN = {
    "no config": (remove("config.json"), "no config.json in it"),
    "broken json": (write("config.json", '{"model_type": '), "config.json: not readable as JSON"),
    "no object": (write("config.json", "[1]"), "config.json: an object is needed, not list"),
    "foreign": (edit(model_type="mamba"), "config.json: model_type 'mamba' is not supported; supported: gpt2, llama"),
    "no type": (edit(model_type=...), "config.json: model_type is missing"),
    "no size": (edit(hidden_size=...), "config.json: hidden_size is missing"),
    "text as size": (edit(hidden_size="16"), "config.json: "),
    "sizes that do not fit": (edit(num_attention_heads=3), r"config.json: model.n_head \(3\) must be a multiple"),
    "activation": (edit(hidden_act="tanh"), "config.json: activation 'tanh' is not supported; supported: gelu_new"),
    "biases": (edit(mlp_bias=True), "config.json: mlp_bias=True is not supported for model_type 'llama'"),
    "biases that are missing": (edit(attention_bias=True), "tensor model.layers.0.self_attn.q_proj.bias is missing"),
    "quantized": (edit(quantization_config={"quant_method": "fp8"}), "config.json: quantization_config=.*fp8"),
    "scaled rotary": (
        edit(rope_parameters={"rope_type": "dynamic", "factor": 8.0, "rope_theta": 1e4}),
        "config.json: rotary positions of rope_type='dynamic' are not supported; supported: default, linear",
    ),
    "scaled rotary, old": (edit(rope_parameters=None, rope_scaling={"type": "ntk"}), "rotary .* rope_type='ntk'"),
    "partial rotary": (edit(partial_rotary_factor=0.5), "rotary positions with partial_rotary_factor=0.5"),
    "rotary per layer": (edit(rope_parameters={"full_attention": {"rope_theta": 1e6}}), "rotary .* full_attention="),
    "rotary list": (edit(rope_parameters=[1]), "config.json: "),
    "no weights": (remove("model.safetensors"), "no model.safetensors in it"),
    "truncated": (truncate, "model.safetensors: cannot be read"),
    "empty": (write("model.safetensors", ""), "model.safetensors: cannot be read"),
    "a tensor too few": (edit(num_hidden_layers=2), "tensor model.layers.1.input_layernorm.weight is missing"),
    "another shape": (edit(vocab_size=12), r"model.embed_tokens.weight has shape \[11, 16\], .* asks for \[12, 16\]"),
    "a lost shard": (shard({"model.embed_tokens.weight": "lost.safetensors"}), "lost.safetensors: cannot be read"),
    "an empty index": (write(INDEX, "{}"), "tensor model.embed_tokens.weight is missing"),
    "a lying index": (shard({"model.embed_tokens.weight": "model.safetensors", "x": "y"}), "tensor .* is missing"),
}


@pytest.mark.parametrize(("damage", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_folder_is_refused_in_one_line(damage: Callable[[Path], object], message: str, tmp_path: Path):
    folder = tmp_path / "some-model"
    save_pretrained(Decoder(LLAMA), folder, token_ids={})
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_pretrained(folder)
    assert "\n" not in str(caught.value)
    assert "some-model" in str(caught.value)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({**NATIVE.to_dict(), "from_the_future": 1}, "config.json: unknown model field 'from_the_future'"),
        ({**NATIVE.to_dict(), "position": "_target_"}, "config.json: model.position=_target_ is not one of learned"),
        ({**NATIVE.to_dict(), "n_embd": "16"}, "config.json: "),
        ([], "config.json: "),
        (..., "config.json: model is missing"),
    ],
)
def test_a_foreign_native_configuration_is_refused_in_one_line(model: object, message: str, tmp_path: Path):
    save_pretrained(Decoder(NATIVE), tmp_path, token_ids={})
    edit(model=model)(tmp_path)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_missing_folder_is_refused_in_one_line(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"nowhere: no config.json in it"):
        load_pretrained(tmp_path / "nowhere")
