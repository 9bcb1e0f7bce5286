"""GGUF files: what transformers reads from them, what we read back, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf_models import LLAMA3, MODELS, write_model

from genai_pl.cli.export_gguf import write_gguf_folder
from genai_pl.errors import CheckpointError, ConfigError
from genai_pl.loading import load, stored_dtypes
from genai_pl.models import ModelConfig, build_model
from genai_pl.models.gguf.architectures import ARCHITECTURES, architecture_of
from genai_pl.models.gguf.package import check_type
from genai_pl.models.gguf.reader import GgufFile
from genai_pl.models.hf.config import family_of
from tests.conftest import some

gguf = pytest.importorskip("gguf", reason="GGUF files are written by the package gguf")
# architectures whose tensors transformers reads itself, by a configuration from the folder: it does not take all from the file
READ_BY_TRANSFORMERS = ("gpt2", "llama", "llama3", "qwen2", "qwen3", "qwen3_moe", "gemma3")
LIKE_OTHERS = ("llama_linear", "mistral", "qwen3_moe", "olmoe", "qwen2")  # whose tables and keys other kinds have too
IDS = torch.randint(0, 400, (2, 40), generator=torch.Generator().manual_seed(0))
SMALL = {"n_layer": 2, "n_embd": 32, "n_head": 4, "vocab_size": 61, "max_seq_len": 32, "attention": "sdpa"}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory):
    """written(kind): the folder with hf/ and gguf/ of a kind; each is made once."""
    made: dict[str, Path] = {}

    def write(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            write_model(kind, made[kind] / "hf")
            loaded = load(str(made[kind] / "hf"))
            write_gguf_folder(loaded.model, loaded, made[kind] / "gguf", quantize=None, name=kind)
        return made[kind]

    return write


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] if kind in LIKE_OTHERS else []) for kind in MODELS]
)
def test_a_file_reads_back_with_the_same_weights_logits_and_end_tokens(kind: str, written):
    ours, back = (load(str(written(kind) / name)) for name in ("hf", "gguf"))
    before, after = ours.model.state_dict(), back.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    with torch.no_grad():
        assert torch.equal(ours.model(IDS), back.model(IDS))
    kinds = [family_of(loaded.model.config).model_type for loaded in (ours, back)]
    assert kinds[0] == kinds[1] or kinds == ["mistral", "llama"]  # one architecture, the same arithmetic
    assert back.model.config.eos_token_ids == ours.model.config.eos_token_ids
    assert {*stored_dtypes(str(written(kind) / "gguf")).values()} == {torch.float32}


@pytest.mark.parametrize("kind", some(READ_BY_TRANSFORMERS))
def test_transformers_reads_the_file_with_the_logits_of_the_folder(kind: str, written):
    from transformers import AutoModelForCausalLM

    folder = written(kind)
    theirs = AutoModelForCausalLM.from_pretrained(folder / "hf").eval()
    options = {"gguf_file": "model.gguf", "config": theirs.config}
    read = AutoModelForCausalLM.from_pretrained(folder / "gguf", **options).eval()
    with torch.no_grad():
        torch.testing.assert_close(read(IDS).logits, theirs(IDS).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda found: found.family)
def test_names_of_tensors_are_those_of_the_package(architecture):
    from genai_pl.models.hf.families import FAMILIES

    family = next(family for family in FAMILIES if family.model_type == architecture.family)
    model_type = {"ministral": "mistral"}.get(architecture.family, architecture.family)
    kind = next(name for name, values in MODELS.items() if values["model_type"] == model_type)
    config = _config(kind)
    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
    theirs = gguf.get_tensor_name_map(arch, config.n_layer)
    ours = {name: row.hf_name for row in architecture.table(config) for name in row.names}
    compared = 0
    for row in family.rows(config):
        # experts one by one or joined are stacked in a file, and have no name of their own
        name = theirs.get_name(row.hf_name, try_suffixes=(".weight", ".bias"))
        if name and ".experts." not in row.hf_name:
            compared += 1
            name += ".weight" if name.endswith("attn_sinks") else ""  # the file has it, the map does not
            assert {ours[part] for part in row.names} == {name}
    assert compared > 5 * config.n_layer


def _config(kind: str) -> ModelConfig:
    """The configuration of a kind, as it is read from a folder without weights."""
    import json
    import tempfile

    from transformers import AutoConfig

    from genai_pl.models.hf.config import read_config

    with tempfile.TemporaryDirectory() as name:
        AutoConfig.for_model(**MODELS[kind]).save_pretrained(name)
        file = Path(name) / "config.json"
        values = json.loads(file.read_text())
        file.write_text(json.dumps({**values, "architectures": []}))
        return read_config(file)[0]


@pytest.mark.parametrize("quantize", ["f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"])
def test_matrices_have_the_type_and_the_numbers_of_the_package(quantize: str, written, tmp_path: Path):
    from gguf import quants

    loaded = load(str(written("llama") / "hf"))
    write_gguf_folder(loaded.model, loaded, tmp_path / "out", quantize=quantize, name="llama")
    file, kind = GgufFile(tmp_path / "out" / "model.gguf"), gguf.GGMLQuantizationType[quantize.upper()]
    outer = gguf.GGMLQuantizationType.Q8_0 if quantize.startswith("q") else kind
    types = {name: tensor.tensor_type for name, tensor in file.tensors.items()}
    assert types["blk.1.ffn_up.weight"] == kind
    assert types["token_embd.weight"] == types["output.weight"] == outer
    assert types["blk.1.attn_norm.weight"] == gguf.GGMLQuantizationType.F32
    exact = loaded.model.state_dict()["blocks.1.mlp.up_proj.weight"].numpy()
    expected = quants.dequantize(quants.quantize(exact, kind), kind)
    back = load(str(tmp_path / "out")).model
    np.testing.assert_array_equal(back.state_dict()["blocks.1.mlp.up_proj.weight"].numpy(), expected)


def test_rows_that_no_block_divides_are_in_float16(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_model("llama", tmp_path / "hf", intermediate_size=40)
    loaded = load(str(tmp_path / "hf"))
    write_gguf_folder(loaded.model, loaded, tmp_path / "out", quantize="q4_0", name="llama")
    assert (
        "2 matrices are in f16, as their rows are no multiple of 32: blk.0.ffn_down.weight" in capsys.readouterr().out
    )
    file = GgufFile(tmp_path / "out" / "model.gguf")
    assert file.tensors["blk.0.ffn_down.weight"].tensor_type.name == "F16"
    assert file.tensors["blk.0.ffn_up.weight"].tensor_type.name == "Q4_0"


def test_a_window_without_a_counterpart_bounds_the_context(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_model("mistral", tmp_path / "hf", sliding_window=48)
    loaded = load(str(tmp_path / "hf"))
    write_gguf_folder(loaded.model, loaded, tmp_path / "out", quantize="f32", name="mistral")
    assert "llama.cpp's llama has no windows: context_length is the window, 48 tokens" in capsys.readouterr().out
    assert GgufFile(tmp_path / "out" / "model.gguf").keys["llama.context_length"] == 48
    assert "PARAMETER num_ctx 48\n" in (tmp_path / "out" / "Modelfile").read_text()


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("gpt2", {"activation_function": "gelu"}, "gpt2 has no model.activation=gelu, only gelu_tanh"),
        ("qwen3", {"rope_parameters": LLAMA3}, "qwen3 has no rotary scaling llama3, only none, linear, yarn"),
        ("qwen3", {"attention_bias": True}, "qwen3 has no model.qkv_bias=True, only False"),
        ("qwen3_moe", {"norm_topk_prob": False}, "qwen3moe has no model.normalize_top_k=False"),
        ("olmoe", {"num_key_value_heads": 2}, "olmoe has no grouped heads, and this model has model.n_kv_head=2 of 4"),
        ("gemma3", {"query_pre_attn_scalar": 64}, "gemma3 has no model.attention_scale=0.125, only 0.176777"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(kind: str, changes: dict, message: str, monkeypatch):
    monkeypatch.setitem(MODELS, kind, {**MODELS[kind], **changes})
    with pytest.raises(ConfigError) as error:
        architecture_of(_config(kind))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"shape": "encoder"}, "writes decoders with a language-model head, not this encoder, head=linear"),
        ({"norm_order": "post"}, "llama.cpp has no model that no class of transformers has; it has gpt2, llama"),
        ({"softcap": 5.0, "attention": "auto"}, "llama.cpp has no model that no class of transformers has"),
    ],
)
def test_models_without_an_architecture_are_refused(fields: dict, message: str):
    with pytest.raises(ConfigError) as error:
        architecture_of(ModelConfig(**{**SMALL, **fields}))
    assert message in str(error.value)


def test_types_that_the_package_does_not_write_are_refused_with_the_way():
    with pytest.raises(ConfigError, match=r"llama-quantize model\.gguf model-q4_k_m\.gguf q4_k_m"):
        check_type("q4_k_m")
    with pytest.raises(ConfigError, match=r"llama-quantize model\.gguf model-q6_k\.gguf q6_k"):
        check_type("Q6_K")
    with pytest.raises(ConfigError, match="quantize=Q8_0: write quantize=q8_0"):
        check_type("Q8_0")
    with pytest.raises(ConfigError, match="quantize=int8 is not one of f32, f16, bf16, q8_0"):
        check_type("int8")


def test_a_model_of_ours_is_written_as_the_first_family_that_states_it(tmp_path: Path):
    from genai_pl.data import byte_tokenizer
    from genai_pl.exporting import export_model

    config = ModelConfig(**{**SMALL, "vocab_size": 258, "position": "rotary", "norm": "rmsnorm", "bias": False})
    config = ModelConfig(**{**config.to_dict(), "gated_mlp": True, "activation": "silu", "intermediate_size": 64})
    export_model(build_model(config), byte_tokenizer(), tmp_path / "hf", card={})
    loaded = load(str(tmp_path / "hf"))
    write_gguf_folder(loaded.model, loaded, tmp_path / "out", quantize="f32", name="mine")
    back = load(str(tmp_path / "out"))
    assert back.tokenizer("naïve <|endoftext|>")["input_ids"] == loaded.tokenizer("naïve <|endoftext|>")["input_ids"]
    assert GgufFile(tmp_path / "out" / "model.gguf").keys["general.architecture"] == "llama"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("general.architecture", "mamba", "architecture 'mamba' is not supported; supported: gpt2, llama"),
        ("llama.block_count", 9_000, "the configuration has 9000 layers, and tensors blocks.8999.* are missing"),
        ("llama.rope.dimension_count", 8, "llama.rope.dimension_count=8 is not supported, only 16"),
        ("llama.embedding_length", None, "llama.embedding_length is missing"),
        ("llama.rope.freq_base", "x", "'x'"),
        ("llama.rope.scaling.type", "longrope", "rotary scaling 'longrope' is not supported"),
        ("general.type", "adapter", "a LoRA for llama.cpp, not a model: give the adapter folder that PEFT reads"),
        ("general.type", "mmproj", "a GGUF file of type mmproj, not a model"),
        ("split.count", 3, "one of 3 parts: llama-gguf-split --merge FIRST_PART OUT makes one file"),
    ],
)
def test_files_of_others_are_read_or_refused_in_one_line(key: str, value: object, message: str, written):
    file = GgufFile(written("llama") / "gguf" / "model.gguf")
    file.keys.pop(key, None)
    file.keys |= {} if value is None else {key: value}
    with pytest.raises(CheckpointError) as error:
        file.description()
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF\x03\0\0\0" + b"\xff" * 16, b"no gguf at all"])
def test_a_broken_file_is_one_line(content: bytes, tmp_path: Path):
    (tmp_path / "broken.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"broken.gguf: not readable as GGUF"):
        load(str(tmp_path / "broken.gguf"))


def test_a_cut_file_is_one_line(written, tmp_path: Path):
    whole = (written("llama") / "gguf" / "model.gguf").read_bytes()
    for part in (0.1, 0.5, 0.99):
        (tmp_path / "cut.gguf").write_bytes(whole[: int(len(whole) * part)])
        with pytest.raises(CheckpointError, match=r"cut.gguf: not readable as GGUF"):
            load(str(tmp_path / "cut.gguf"))


def test_the_base_of_windowed_layers_and_untied_heads_are_kept(tmp_path: Path):
    write_model("gemma3", tmp_path / "hf", tie_word_embeddings=False)
    loaded = load(str(tmp_path / "hf"))
    write_gguf_folder(loaded.model, loaded, tmp_path / "out", quantize="f32", name="gemma")
    config = load(str(tmp_path / "out")).model.config
    assert (config.rope_theta, config.rope_theta_local, config.window, config.full_every) == (1e6, 1e4, 16, 2)
    assert not config.tie_embeddings
    assert config.rope_scaling == loaded.model.config.rope_scaling
