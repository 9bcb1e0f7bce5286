"""ONNX Runtime computes what our models compute: from the same graphs, in one pass or token by token."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from torch import Tensor

from genai_pl.cli import generate as run_generate
from genai_pl.cli.command import CONF, register
from genai_pl.cli.export import export
from genai_pl.config.generation import GenerationConfig
from genai_pl.data import byte_tokenizer
from genai_pl.errors import CheckpointError, ConfigError
from genai_pl.exporting import export_model
from genai_pl.generation import generate, generate_text
from genai_pl.loading import load
from genai_pl.models import Decoder, ModelConfig, build_model, load_pretrained
from genai_pl.models.onnx.export import past_names, write_description, write_graphs
from genai_pl.models.onnx.model import load_onnx, open_session
from genai_pl.models.onnx.quantize import quantize_graph

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

V = 61
# fmt: off
THEIRS = {
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 24, "vocab_size": V},
    "llama": {
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "vocab_size": V,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 24,
    },
    "bert": {
        "model_type": "bert", "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1, "vocab_size": V,
        "num_attention_heads": 4, "max_position_embeddings": 24,
    },
    "t5": {
        "model_type": "t5", "d_model": 32, "d_kv": 8, "d_ff": 40, "num_layers": 1, "num_decoder_layers": 2,
        "num_heads": 4, "vocab_size": V, "feed_forward_proj": "gated-gelu", "pad_token_id": 0, "decoder_start_token_id": 0,
    },
}
# fmt: on
CLASSES = {"bert": "AutoModelForMaskedLM", "t5": "AutoModelForSeq2SeqLM"}
SIZES = {"n_layer": 2, "n_head": 4, "n_embd": 32, "vocab_size": V, "max_seq_len": 24, "init_std": 0.2}
GREEDY = GenerationConfig(max_new_tokens=8, temperature=0.0)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory):
    """By model type: transformers' model with large random weights, and the folder with our graphs of it; made once."""
    import transformers

    made = {}

    def get(kind: str):
        if kind not in made:
            torch.manual_seed(0)
            config = transformers.AutoConfig.for_model(**THEIRS[kind])
            model = getattr(transformers, CLASSES.get(kind, "AutoModelForCausalLM")).from_config(config).eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.dim() > 1:
                        parameter.normal_(std=0.2)
            folder = tmp_path_factory.mktemp(kind)
            model.save_pretrained(folder / "hf")
            ours = load_pretrained(folder / "hf")
            (folder / "onnx").mkdir()
            write_graphs(ours, folder / "onnx")
            write_description(ours, folder / "onnx", token_ids={})
            made[kind] = (model, ours, folder / "onnx")
        return made[kind]

    return get


def tokens(*size: int) -> Tensor:
    return torch.randint(1, V, size, generator=torch.Generator().manual_seed(1))


def close(actual: Tensor | np.ndarray, expected: Tensor) -> bool:
    return torch.allclose(torch.as_tensor(actual), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", [pytest.param("gpt2", marks=pytest.mark.slow), "llama"])
def test_the_graph_of_a_decoder_gives_the_logits_of_transformers_token_by_token(theirs, kind: str):
    model, ours, folder = theirs(kind)
    input_ids = tokens(3, 9)
    with torch.no_grad():
        expected = model(input_ids).logits
    session = open_session(folder / "model.onnx")
    names = past_names(2)
    past = [np.zeros((3, ours.config.n_kv_head, 0, 8), np.float32)] * 4
    start = 0
    for end in (1, 5, 6, 7, 9):
        mask = np.ones((3, end), np.int64)
        feeds = {
            "input_ids": input_ids[:, start:end].numpy(),
            "attention_mask": mask,
            **dict(zip(names, past, strict=True)),
        }
        logits, *past = session.run(None, feeds)
        assert close(logits, expected[:, start:end])
        start = end


def test_the_names_of_a_graph_are_those_that_optimum_reads(theirs):
    session = open_session(theirs("gpt2")[2] / "model.onnx")
    past = [f"past_key_values.{n}.{kind}" for n in (0, 1) for kind in ("key", "value")]
    assert [node.name for node in session.get_inputs()] == ["input_ids", "attention_mask", *past]
    present = [name.replace("past_key_values", "present") for name in past]
    assert [node.name for node in session.get_outputs()] == ["logits", *present]


def test_an_encoder_gives_the_logits_of_transformers_whatever_the_padding(theirs):
    model, _, folder = theirs("bert")
    input_ids, mask = tokens(2, 7), torch.ones(2, 7, dtype=torch.long)
    mask[1, 4:] = 0
    types = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 0, 0, 0]])
    with torch.no_grad():
        expected = model(input_ids, attention_mask=mask, token_type_ids=types).logits
    feeds = {"input_ids": input_ids, "attention_mask": mask, "token_type_ids": types}
    actual = open_session(folder / "model.onnx").run(["logits"], {name: t.numpy() for name, t in feeds.items()})[0]
    assert close(torch.tensor(actual)[mask > 0], expected[mask > 0])


@pytest.mark.slow
def test_an_encoder_decoder_gives_the_logits_of_transformers_token_by_token(theirs):
    model, _, folder = theirs("t5")
    source, target = tokens(2, 6), tokens(2, 5)
    mask = torch.ones_like(source)
    mask[1, :2] = 0
    with torch.no_grad():
        expected = model(input_ids=source, attention_mask=mask, decoder_input_ids=target).logits
    reader = load_onnx(folder).encode_source(source, mask)
    cache = reader.new_cache(2, 5)
    actual = [reader.features(part, cache=cache) for part in target.split([2, 1, 1, 1], dim=1)]
    assert close(torch.cat(actual, dim=1), expected)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_padded_prompts_are_continued_greedily_as_torch_does(theirs, kind: str):
    _, ours, folder = theirs(kind)
    input_ids, segment_ids = tokens(3, 7), torch.ones(3, 7, dtype=torch.long)
    segment_ids[1, :3] = 0
    actual = generate(load_onnx(folder), input_ids, GREEDY, segment_ids=segment_ids)
    assert actual.tolist() == generate(ours, input_ids, GREEDY, segment_ids=segment_ids).tolist()


def test_text_that_outgrows_the_context_goes_on_as_torch_does(theirs):
    _, ours, folder = theirs("llama")
    config = GenerationConfig(max_new_tokens=24, temperature=0.0)
    actual = generate(load_onnx(folder), tokens(1, 12), config)
    assert actual.tolist() == generate(ours, tokens(1, 12), config).tolist()


@pytest.mark.slow
def test_an_encoder_decoder_writes_the_text_that_torch_writes_greedily_and_with_beams(tmp_path: Path):
    tokenizer = byte_tokenizer()
    sizes = {**SIZES, "n_layer": 1, "vocab_size": len(tokenizer)}
    ours = build_model(ModelConfig(**sizes, shape="encoder_decoder", position="relative", norm="rmsnorm", bias=False))
    write_graphs(ours, tmp_path)
    write_description(ours, tmp_path, token_ids={})
    actual, prompts = load_onnx(tmp_path), ["what it reads", "this"]
    for config in (GREEDY, GenerationConfig(max_new_tokens=6, num_beams=3, num_return=2, temperature=0.0)):
        texts = generate_text(ours.eval(), tokenizer, prompts, config)
        assert generate_text(actual, tokenizer, prompts, config) == texts
        assert all(map(any, texts))


def test_a_reward_model_scores_the_last_token_that_is_no_padding(tmp_path: Path):
    model = Decoder(ModelConfig(**{**SIZES, "n_layer": 1}, head="score")).eval()
    write_graphs(model, tmp_path)
    input_ids, mask = tokens(2, 6), torch.ones(2, 6, dtype=torch.long)
    mask[1, 4:] = 0
    feeds = {"input_ids": input_ids.numpy(), "attention_mask": mask.numpy()}
    actual = open_session(tmp_path / "model.onnx").run(None, feeds)[0]
    with torch.no_grad():
        alone = [model.score(model.features(row[None]))[0, -1] for row in (input_ids[0], input_ids[1, :4])]
    assert close(actual, torch.stack(alone))


def test_eight_bits_make_a_smaller_graph_that_says_nearly_the_same(theirs, tmp_path: Path):
    _, ours, folder = theirs("llama")
    for name in ("model.onnx", "config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    cost = quantize_graph(tmp_path / "model.onnx", vocab_size=V, max_seq_len=24)
    assert cost.after == (tmp_path / "model.onnx").stat().st_size
    with torch.no_grad():
        exact, actual = ours(tokens(2, 9)), load_onnx(tmp_path)(tokens(2, 9))
    assert 0 < (actual - exact).abs().mean() < 0.05 * exact.std()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.onnx"]


def run_command(command: Callable[[DictConfig], int], **options: object) -> int:
    """A command with its configuration."""
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return command(compose(command.__name__, [f"{key}={value}" for key, value in options.items()]))


@pytest.mark.slow
def test_the_commands_export_a_model_and_continue_a_prompt_with_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    tokenizer, folder, out = byte_tokenizer(), tmp_path / "hf", tmp_path / "onnx"
    model = build_model(ModelConfig(**{**SIZES, "n_layer": 1, "vocab_size": len(tokenizer)}))
    export_model(model, tokenizer, folder, card={})
    assert run_command(export, checkpoint=folder, format="onnx", quantize="int8", out=out) == 0
    assert " MB for " in capsys.readouterr().out
    assert json.loads((out / "config.json").read_text())["model_type"] == "gpt2"
    options = {"generation": "greedy", "generation.max_new_tokens": 12, "prompt": "abc", "device": "cpu"}
    assert run_command(run_generate.generate, checkpoint=out, **options) == 0
    loaded = load(str(out), onnx=True)
    config = GenerationConfig(max_new_tokens=12, temperature=0.0)
    assert capsys.readouterr().out == f"abc{generate_text(loaded.model, tokenizer, ['abc'], config)[0][0]}\n"
    with pytest.raises(CheckpointError, match="an ONNX model, which"):
        load(str(out))


def test_what_has_no_graph_is_refused_in_one_line(tmp_path: Path):
    with pytest.raises(ConfigError, match="format=onnx writes full attention"):
        write_graphs(Decoder(ModelConfig(**SIZES, attention_kind="window", window=4)), tmp_path)
